"""What is written to disk and read again: whole, hashed, within limits."""
