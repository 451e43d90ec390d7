"""Checkpoints that a test changes."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from sae.files.writing import write_bytes


def save_state(state: object, path: Path) -> None:
    """Write a checkpoint's state as training writes it, with its hash."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(path, buffer.getvalue())
