"""The commit that a run records."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sae.config import environment

ROOT = Path(__file__).parents[2]


def test_a_checkout_has_a_commit() -> None:
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert environment.git_commit() == head.strip()


def test_a_package_installed_inside_another_checkout_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `.venv/lib/python3/site-packages` of a project of the user's is."""
    monkeypatch.setattr(environment, "_CHECKOUT", ROOT / "tests")
    assert environment.git_commit() is None
    monkeypatch.setattr(environment, "_CHECKOUT", tmp_path)
    assert environment.git_commit() is None
