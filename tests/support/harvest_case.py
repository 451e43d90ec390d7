"""What the tests of harvesting share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sae.config.settings import RunConfig

HOOKS = ["blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out"]
Config = Callable[..., RunConfig]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones as well."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
