"""Look at a feature store in the terminal or as a self-contained page."""

from __future__ import annotations

from sae.viewer.page import write_page
from sae.viewer.terminal import print_feature, print_features

__all__ = ["print_feature", "print_features", "write_page"]
