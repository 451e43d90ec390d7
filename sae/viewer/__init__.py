"""Look at a feature store in the terminal, as a self-contained page, or in another viewer."""

from __future__ import annotations

from sae.viewer.exporting import Export, export_features
from sae.viewer.page import write_page
from sae.viewer.sheet import write_sheet
from sae.viewer.terminal import print_feature, print_features, print_hits
from sae.viewer.text_page import write_text_page

__all__ = [
    "Export",
    "export_features",
    "print_feature",
    "print_features",
    "print_hits",
    "write_page",
    "write_sheet",
    "write_text_page",
]
