"""Files written to disk and read back: complete, hashed, within limits."""
