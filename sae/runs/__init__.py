"""What a run folder goes through, one verb a file."""
