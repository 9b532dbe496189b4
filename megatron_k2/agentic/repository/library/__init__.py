"""Domains that the scripted model knows, a TOML file a category; the notation is in reading.py."""
