"""The terminal: output, and the progress of a command."""
