"""Side-by-side measurements against TRL and PEFT: python -m bench --help."""
