"""Look at a feature store: in the terminal, or as one page that needs nothing else."""

from __future__ import annotations

from sae.viewer.page import write_page
from sae.viewer.terminal import print_feature, print_features

__all__ = ["print_feature", "print_features", "write_page"]
