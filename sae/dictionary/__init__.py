"""Dictionaries: forward pass, files, and the model and hook point they belong to."""
