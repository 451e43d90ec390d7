"""How numbers are kept and shown: estimates, tables, figures."""
