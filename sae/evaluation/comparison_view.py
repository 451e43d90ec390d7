"""Tables of a comparison, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from sae.dictionary.token_policy import TokenPolicy
from sae.evaluation.comparison import Compared, Comparison
from sae.evaluation.metrics import below_noise
from sae.evaluation.published_view import published_of_several
from sae.evaluation.report import HEADINGS
from sae.evaluation.report_view import (
    COUNTS,
    baselines_have_fewer,
    describe_masks,
    describe_text,
    sections,
    share_of,
    table_rows,
)
from sae.results.estimate import Estimate, error_note
from sae.results.markdown import code, document, pipe_table, plain
from sae.results.table import NONE, SAME, Column, Table

if TYPE_CHECKING:
    from rich.console import Group

_LABEL = 20
_BASELINE_METRICS = ("l0", "fvu", "delta_ce", "kl")


def comparison_tables(comparison: Comparison, width: int | None = None) -> list[Group]:
    """A table of the dictionaries with every metric, and one of their baselines with the main ones.

    Args:
        comparison: of several dictionaries.
        width: of the terminal, in characters; None: wide enough.
    """
    counts = comparison.evaluated
    rows = list(_rows(comparison.dictionaries))
    names = [metric for metric, _, _ in rows]
    columns = [
        Column(_broken(label), ["\n".join(cells[number]) for _, _, cells in rows])
        for number, label in enumerate(comparison.dictionaries)
    ]
    table = Table(
        [Column("metric", names, is_text=True), *columns],
        title=f"{comparison.hook}: {counts['tokens']:,} held-out tokens of {counts['documents']:,} documents",
        notes=[error_note(counts), _second_lines(comparison), _published(comparison)],
        sections=sections(names),
    )
    baselines = comparison.baselines.values()
    shown = [metric for metric in _BASELINE_METRICS if any(metric in entry.metrics for entry in baselines)]
    metric_columns = [Column(metric, [_cell(entry, metric)[0] for entry in baselines]) for metric in shown]
    names_column = Column("baseline", list(map(_heading, comparison.baselines)), is_text=True)
    baseline_table = Table([names_column, *metric_columns], notes=[_fewer_tokens(comparison)])
    return [table.in_terminal(width), baseline_table.in_terminal(width)]


def _heading(baseline: str) -> str:
    """The name of a baseline with the heading of its kind."""
    kind = next((kind for kind in HEADINGS if baseline.startswith(kind)), "")
    return HEADINGS.get(kind, "") + baseline.removeprefix(kind)


def _broken(label: str) -> str:
    """A long name on several lines."""
    return "\n".join(label[start : start + _LABEL] for start in range(0, len(label), _LABEL))


def comparison_markdown(comparison: Comparison) -> str:
    """`compare.md`."""
    dictionaries, baselines = comparison.dictionaries, comparison.baselines
    parts = [
        f"# Comparison at {code(comparison.hook)}",
        _subject(comparison),
        "\n".join(f"- {plain(name)}: {plain(entry.description)}" for name, entry in dictionaries.items()),
        _table(dictionaries),
        f"Values are means over tokens, {error_note(comparison.evaluated)}. "
        f"{_sentence(plain(_second_lines(comparison)))}",
        *([_sentence(plain(_published(comparison)))] if _published(comparison) else []),
        "## Baselines",
        _table({_heading(name): entry for name, entry in baselines.items()}),
        _sentence("; ".join(plain(entry.description) for entry in baselines.values())),
    ]
    note = _fewer_tokens(comparison)
    return document([*parts, *([_sentence(note)] if note else [])])


def _published(comparison: Comparison) -> str:
    return published_of_several({name: entry.published for name, entry in comparison.dictionaries.items()})


def _table(columns: Mapping[str, Compared]) -> str:
    rows = [
        [f"`{metric}`", meaning, *("<br>".join(lines) for lines in cells)] for metric, meaning, cells in _rows(columns)
    ]
    return pipe_table(["", "", *map(plain, columns)], rows)


def _rows(columns: Mapping[str, Compared]) -> Iterator[tuple[str, str, list[list[str]]]]:
    """Name, meaning, and the lines of a cell for every column; metrics that no column has are left out."""
    measured = {name for entry in columns.values() for name in entry.metrics}
    for metric, meaning in table_rows().items():
        if metric in COUNTS:
            yield metric, meaning, [_counted(entry, metric) for entry in columns.values()]
        elif metric in measured:
            yield metric, meaning, [_cell(entry, metric) for entry in columns.values()]


def _cell(entry: Compared, metric: str) -> list[str]:
    value = str(entry.metrics.get(metric, Estimate(None, None)))
    return [value, signed(entry.differences[metric])] if metric in entry.differences else [value]


def _counted(entry: Compared, metric: str) -> list[str]:
    count = entry.dead if metric == "dead" else entry.dense
    return [NONE if count is None or not entry.features else share_of(count, entry.features)]


def signed(difference: Estimate) -> str:
    """`+0.0123 ± 0.0012`, after a mark if it is below noise."""
    if difference.value is None:
        return NONE
    text = str(difference)
    text = text if text.startswith("-") else f"+{text}"
    return f"{SAME} {text}" if below_noise(difference) else text


def _second_lines(comparison: Comparison) -> str:
    return (
        f"second lines: difference to {comparison.first} ± its standard error, paired over documents; {SAME}: below "
        "noise, its 95 % interval holds 0"
    )


def _fewer_tokens(comparison: Comparison) -> str:
    """A note if the baselines are measured on fewer tokens than the dictionaries; else empty."""
    evaluated = comparison.evaluated
    return baselines_have_fewer(evaluated, evaluated.get("baseline_tokens"), evaluated["baseline_positions"])


def _subject(comparison: Comparison) -> str:
    tokens = comparison.evaluated
    masks = describe_masks(TokenPolicy.from_json(comparison.token_policy))
    masked = f"left out are {tokens['masked_tokens']:,} tokens: {masks}" if masks else "no token is left out"
    losses = "Losses were not measured: no language model was given."
    if tokens["downstream_tokens"] is not None:
        losses = (
            f"Losses are over {tokens['downstream_tokens']:,} eligible positions with a next token, of "
            f"{tokens['downstream_documents']:,} documents."
        )
    return (
        f"Activations of {code(comparison.model.get('name', 'unknown model'))}, text {describe_text(comparison.data)}. "
        f"All dictionaries are evaluated on the same {tokens['tokens']:,} held-out tokens of {tokens['documents']:,} "
        f"documents; {masked}. {losses}"
    )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}." if text else ""
