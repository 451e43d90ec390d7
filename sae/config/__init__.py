"""Settings: definitions, reading and checks."""
