"""Recipes: experiments in TOML files, read and run from model to pictures."""
