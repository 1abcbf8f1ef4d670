"""Benchmarks against TRL and PEFT: python -m bench --help."""
