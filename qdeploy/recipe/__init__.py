"""Recipes: experiments written down in TOML files, read and run the whole way from model to pictures."""
