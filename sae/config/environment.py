"""The environment of a run: its device, and the commit of this package."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import torch

from sae.errors import ConfigError

_CHECKOUT = Path(__file__).parents[2]
"""The folder that holds the package: of the checkout, or of installed packages."""


def choose_device(name: str) -> torch.device:
    """The device with a name; `auto` is a GPU if there is one.

    Raises:
        ConfigError: torch does not know the device, it is missing, lacks float64 for the sums (mps), or holds no
            numbers (meta).
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, dtype=torch.float64, device=device).item()
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).strip().splitlines()[0][:120]
        raise ConfigError(f"device {name!r}: not available here ({reason}); use device=auto or device=cpu") from error
    return device


def memory_of(device: torch.device) -> int:
    """Total memory of a device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def git_commit() -> str | None:
    """The commit of this package; None if it is installed, even if it is installed inside a git checkout."""
    command = ["git", "-C", str(_CHECKOUT), "rev-parse", "--show-prefix", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    prefix, _, commit = answer.stdout.rstrip("\n").rpartition("\n")
    return None if prefix else commit
