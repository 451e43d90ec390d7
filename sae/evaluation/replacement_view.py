"""Losses with modules replaced, as tables for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sae.dictionary.token_policy import TokenPolicy
from sae.evaluation.replacement import ReplacementReport
from sae.evaluation.report_view import describe_masks, describe_text
from sae.results.estimate import Estimate, error_note
from sae.results.markdown import code, document, plain
from sae.results.table import NONE, Column, Table

if TYPE_CHECKING:
    from rich.console import Group

MEANINGS = {
    "dictionary": "transcoder",
    "skip": "skip connection alone",
    "linear": "best affine map",
    "mean": "mean",
    "zero": "0",
}
"""Names of stand-ins in tables."""


def replacement_tables(report: ReplacementReport, width: int | None = None) -> list[Group]:
    """Losses with all modules replaced, and with each alone.

    Args:
        report: the losses.
        width: of the terminal, in characters; None: wide enough.
    """
    return [table.in_terminal(width) for table in _tables(report)]


def replacement_markdown(report: ReplacementReport) -> str:
    """`replacement.md`."""
    masks = describe_masks(TokenPolicy.from_json(report.token_policy))
    parts = [
        f"# {_title(report)} of {code(report.model.get('name', 'unknown model'))}",
        f"Losses on text {describe_text(report.data)}, over {report.tokens:,} held-out positions with a next token, of "
        f"{report.documents:,} documents. "
        + (f"Never replaced are {masks}. " if masks else "Every token is replaced. ")
        + f"It took {report.seconds:,.1f} s.",
    ]
    for table in _tables(report):
        parts += [f"## {table.title}", table.in_markdown(), *table.markdown_notes()]
    parts += ["## Transcoders", "\n".join(_described(report))]
    return document(parts)


def _title(report: ReplacementReport) -> str:
    count = len(report.modules)
    return f"{count} modules replaced" if count > 1 else "A module replaced"


def _tables(report: ReplacementReport) -> list[Table]:
    first, several = report.modules[0], len(report.modules) > 1
    note = error_note({"documents": report.documents})
    notes = [
        f"{note[0].upper()}{note[1:]}.",
        f"The affine map is the best one from what a transcoder reads; it and the mean are fitted on "
        f"{report.fitted_tokens:,} training tokens. Recovered: share of the loss of the mean that is avoided.",
    ]
    if "skip" in report.together:
        notes.append("The skip connection alone has the best constant.")
    elif any("skip" in module.losses for module in report.modules):
        notes.append("Only some of the transcoders have a skip connection.")
    title = "All modules replaced together" if several else f"{first.reads} → {first.gives} replaced"
    tables = [Table(_together(report), title, notes)]
    return [*tables, Table(_alone(report), "One module replaced at a time")] if several else tables


def _together(report: ReplacementReport) -> list[Column]:
    """A row for each stand-in, after one for the clean model."""
    losses = list(report.together.values())
    return [
        Column("replaced by", ["nothing", *(MEANINGS[kind] for kind in report.together)], is_text=True),
        _estimates("loss", [report.ce_clean, *(entry.ce for entry in losses)]),
        _estimates("Δ loss", [None, *(entry.delta_ce for entry in losses)]),
        _estimates("KL", [None, *(entry.kl for entry in losses)]),
        _estimates("recovered", [None, *(entry.ce_recovered for entry in losses)]),
    ]


def _alone(report: ReplacementReport) -> list[Column]:
    """A row for each module."""
    modules = report.modules
    kinds = [kind for kind in MEANINGS if any(kind in module.losses for module in modules)]
    found = {kind: [module.losses.get(kind) for module in modules] for kind in kinds}
    return [
        Column("module", [module.gives for module in modules], is_text=True),
        *(
            _estimates(f"Δ loss,\n{MEANINGS[kind]}", [entry and entry.delta_ce for entry in entries])
            for kind, entries in found.items()
        ),
        _estimates(f"KL,\n{MEANINGS['dictionary']}", [entry and entry.kl for entry in found["dictionary"]]),
        _estimates(
            f"recovered,\n{MEANINGS['dictionary']}", [entry and entry.ce_recovered for entry in found["dictionary"]]
        ),
    ]


def _estimates(heading: str, estimates: Sequence[Estimate | None]) -> Column:
    cells = [NONE if estimate is None else str(estimate) for estimate in estimates]
    return Column(heading, cells, [NONE if estimate is None else estimate.short() for estimate in estimates])


def _described(report: ReplacementReport) -> list[str]:
    return [f"- {plain(module.transcoder)}: {code(module.reads)} → {code(module.gives)}" for module in report.modules]
