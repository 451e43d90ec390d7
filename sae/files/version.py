"""The version of the package, recorded in everything that it writes."""

__version__ = "0.2.0"
