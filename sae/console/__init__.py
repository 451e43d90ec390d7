"""The terminal: what is printed, and how far a command is."""
