"""Build the model and the tweets of the recipe `quickstart` without the Hub: `python -m quickstart`."""
