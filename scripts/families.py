"""Tiny random models of many families: by which road each hook point's replacements become logits.

Run as `scripts/families [FAMILY...]`. A cell is that of the worst of two blocks in the middle.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from family_configs import FAMILIES, SMALL

import sae
from sae.config.sources import ModelConfig
from sae.dictionary.hook_points import KINDS
from sae.dictionary.model_identity import DEMO_FOLDER
from sae.model.language_model import LanguageModel
from sae.model.tail import SHORT

SHORT_ROAD, WHOLE_ROAD, READ, REFUSED, LACKING = "short", "whole", "read", "refused", ""
_WORST = (REFUSED, WHOLE_ROAD, READ, SHORT_ROAD)


@dataclass(frozen=True)
class FamilyRow:
    """What a family's hook points are.

    Attributes:
        family: its `model_type`.
        cells: by kind of hook point, the road, `read` (it cannot be replaced), `refused`, or nothing: it has none.
        reasons: of what is refused, and of whole roads.
        failure: why the family cannot be used at all; None if it can.
    """

    family: str
    cells: dict[str, str]
    reasons: dict[str, str]
    failure: str | None = None


def write_model(family: str, folder: Path, **settings: Any) -> Path:
    """A random model of four blocks with weights far from where they begin, and the demo model's tokenizer.

    Args:
        family: key of `FAMILIES`.
        folder: where to.
        settings: entries of the configuration that differ from the family's.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family], **settings})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_FOLDER).save_pretrained(folder)
    return folder


def family_row(family: str, folder: Path, blocks: tuple[int, ...] = (1, 2)) -> FamilyRow:
    """Every hook point of some blocks, proved; the model is written into `folder`."""
    try:
        model = LanguageModel(ModelConfig(name=str(write_model(family, folder))))
        hooks = model.hooks()
    except Exception as error:
        return FamilyRow(family, {}, {}, f"{type(error).__name__}: {str(error)[:160]}")
    cells, reasons = {}, {}
    for hook in hooks:
        if hook.block not in blocks:
            continue
        cell, reason = SHORT_ROAD, None
        try:
            road = model.tail(hook.name).road
            cell, reason = (SHORT_ROAD if road.name == SHORT else WHOLE_ROAD), road.reason
        except sae.SaeError as error:
            cell = READ if hook.refusal else REFUSED
            reason = None if hook.refusal else str(error).partition(": ")[2]
        cells[hook.kind] = min(cell, cells.get(hook.kind, cell), key=_WORST.index)
        if reason:
            reasons[hook.kind] = reason
    return FamilyRow(family, cells, reasons)


def family_rows(families: Iterable[str]) -> Iterator[FamilyRow]:
    """One family after another; models are deleted when they have been tried."""
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            yield family_row(family, Path(folder) / family)


def table(rows: list[FamilyRow]) -> str:
    """As Markdown, a line for each family; then the reasons."""
    kinds = [kind for kind in KINDS if any(kind in row.cells for row in rows)]
    marks = {SHORT_ROAD: "s", WHOLE_ROAD: "w", READ: "r", REFUSED: "**x**", LACKING: ""}
    lines = ["| family | " + " | ".join(f"`{kind}`" for kind in kinds) + " |", "|:--" * (len(kinds) + 1) + "|"]
    for row in rows:
        if row.failure is None:
            marked = (marks[row.cells.get(kind, LACKING)] for kind in kinds)
            lines.append(f"| {row.family} | " + " | ".join(marked) + " |")
    lines += ["", "s: short road, exact. w: whole model for each replacement, exact. r: read only. x: refused."]
    for row in rows:
        lines += [f"- {row.family} {kind}: {row.cells[kind]}: {reason}" for kind, reason in row.reasons.items()]
        lines += [f"- {row.family}: not used: {row.failure}"] if row.failure else []
    return "\n".join(lines)


def main(families: list[str]) -> None:
    """Print the table, and how many cells are of which kind."""
    rows: list[FamilyRow] = []
    for row in family_rows(families or list(FAMILIES)):
        rows.append(row)
        print(row.family, row.failure or "", flush=True, file=sys.stderr)
    print(table(rows))
    counts = {cell: sum(list(row.cells.values()).count(cell) for row in rows) for cell in _WORST}
    used = sum(row.failure is None for row in rows)
    print(f"\n{used} of {len(rows)} families: " + ", ".join(f"{count} {cell}" for cell, count in counts.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
