"""What every benchmark's results begin with and how they are written: the machine, the versions, the date."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae.kernels.products import processor

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def machine(device: str = "cpu") -> dict[str, str | int]:
    """What a number depends on beside the code."""
    described: dict[str, str | int] = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    if device != "cpu":
        described["device"] = torch.cuda.get_device_name(device)
    return described


def commit() -> str:
    """The checkout's commit, with a + where it has changes."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", folder, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if git("diff", "--name-only", "HEAD") else "")


def table(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are text."""
    rule = ["---" if number < left else "--:" for number in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)) + "\n"


def write(name: str, title: str, text: str, numbers: dict[str, Any], described: dict[str, str | int]) -> None:
    """Print the report, and keep it as `docs/results/NAME.md` and `docs/results/NAME.json`."""
    print(save(name, title, text, numbers, described))


def save(
    name: str, title: str, text: str, numbers: dict[str, Any], described: dict[str, str | int], folder: Path = RESULTS
) -> str:
    """Keep the report as `FOLDER/NAME.md` and `FOLDER/NAME.json`, each replaced as a whole, and return the former."""
    head = ", ".join(f"{key} {value}" for key, value in described.items())
    report = f"# {title}\n\n{head}\n\n{text}"
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"machine": described, **numbers}, indent=2)
    for ending, whole in (("md", report), ("json", content + "\n")):
        unfinished = folder / f"{name}.{ending}.tmp"
        unfinished.write_text(whole, encoding="utf-8")
        unfinished.replace(folder / f"{name}.{ending}")
    return report
