"""Numbers that others published with a dictionary, next to the same formulas on the evaluation's own tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sae.dictionary.published import Published
from sae.evaluation.published_formulas import REGISTRY, SAELENS
from sae.results.estimate import Estimate
from sae.results.markdown import pipe_table, plain
from sae.results.table import NONE

_OURS = {"l0": "l0", "variance_explained": "explained_variance"}
"""Our metric that means the same, by the published number's name."""


@dataclass(frozen=True)
class _Beside:
    """A published number, and what was measured here.

    Attributes:
        name: of the number.
        published: by its authors, on their text.
        same_formula: by the formulas that made it, on the tokens here; empty if they were left out.
        ours: our metric.
    """

    name: str
    published: float
    same_formula: dict[str, float | None]
    ours: Estimate


def published_markdown(record: Mapping[str, Any]) -> list[str]:
    """A section of `eval.md`; empty if nothing was published with the dictionary.

    Args:
        record: the content of `eval.json`.
    """
    published = Published.of(record)
    if published is None:
        return []
    rows = [
        [
            f"`{row.name}`",
            f"{row.published:.5g}",
            ", ".join(f"{_number(value)} (`{formula}`)" for formula, value in row.same_formula.items()) or NONE,
            f"{row.ours} (`{_OURS[row.name]}`)",
        ]
        for row in _rows(record, published)
    ]
    legacy = record.get("legacy")
    same = f"{SAELENS}'s formulas on {legacy['tokens']:,} tokens" if legacy else f"{SAELENS}'s formulas"
    return [
        "## Published numbers",
        pipe_table(["", "published", f"here, by {same}", "here, by ours"], rows, text_columns=1),
        f"The first column is not ours: {plain(published.source)}. Its authors measured it on their own text, and may "
        "have counted other tokens.",
    ]


def published_note(record: Mapping[str, Any]) -> str:
    """A line for the terminal; empty if nothing was published with the dictionary.

    Args:
        record: the content of `eval.json`.
    """
    published = Published.of(record)
    if published is None:
        return ""
    parts = []
    for row in _rows(record, published):
        here = [f"{_number(value)} by {SAELENS}'s {formula}" for formula, value in row.same_formula.items()]
        here = here or [f"{row.ours.short()} by our {_OURS[row.name]}"]
        parts.append(f"{row.name} {row.published:.5g}, here {', '.join(here)}")
    return f"published, not ours ({published.source}): {'; '.join(parts)}"


def published_of_several(dictionaries: Mapping[str, Published | None]) -> str:
    """A line on what was published with several dictionaries; empty if there is nothing.

    Args:
        dictionaries: by name.
    """
    parts = []
    for name, published in dictionaries.items():
        if published is not None:
            numbers = ", ".join(f"{number} {value:.5g}" for number, value in published.numbers.items())
            parts.append(f"{name}: {numbers} ({published.source})")
    return f"published, not ours: {'; '.join(parts)}" if parts else ""


def _rows(record: Mapping[str, Any], published: Published) -> Iterator[_Beside]:
    legacy = record.get("legacy")
    formulas = legacy["formulas"].get(SAELENS, {}) if legacy else {}
    for name, value in published.numbers.items():
        same = {formula: formulas[formula] for formula in REGISTRY[name] if formula in formulas}
        ours = record.get(_OURS[name])
        yield _Beside(name, value, same, Estimate.from_json(ours) if ours else Estimate(None, None))


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.5g}"
