"""A dictionary's features: collect examples in one pass, save them in a store, look at them."""

from __future__ import annotations

from sae.features.collection import collect
from sae.features.feature import Example, Feature, Histogram, Neighbour, TokenLogit
from sae.features.search import Hit
from sae.features.store import Features, Summary

__all__ = [
    "Example",
    "Feature",
    "Features",
    "Histogram",
    "Hit",
    "Neighbour",
    "Summary",
    "TokenLogit",
    "collect",
]
