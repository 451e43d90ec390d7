"""Language models: loading, identity, and hook points to read or replace."""
