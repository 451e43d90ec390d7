"""Dictionaries on the Hugging Face hub: their names, releases that are known, download, lists."""

from __future__ import annotations

from sae.hub.download import located
from sae.hub.listing import Entry, Listing, list_dictionaries
from sae.hub.names import HubName, missing, parse_name, parse_repository
from sae.hub.releases import RELEASES, Release
from sae.hub.snapshots import Snapshot

__all__ = [
    "RELEASES",
    "Entry",
    "HubName",
    "Listing",
    "Release",
    "Snapshot",
    "list_dictionaries",
    "located",
    "missing",
    "parse_name",
    "parse_repository",
]
