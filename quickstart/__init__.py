"""The offline model and tweets of the recipe `quickstart`: `python -m quickstart` makes them."""
