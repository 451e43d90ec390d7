"""Language models: loaded, identified, read and replaced at hook points."""
