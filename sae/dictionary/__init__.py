"""A dictionary: its forward pass, its files, and where it belongs."""
