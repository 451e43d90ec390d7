"""Settings: read, described, checked."""
