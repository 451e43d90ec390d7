"""Probes for people: Markdown, and tables for the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from sae.probing.probe import MAJORITY
from sae.probing.record import MARKDOWN_FILE, ProbeRecord
from sae.probing.scores import METRICS
from sae.probing.summary import duels, heading, method_order, shown, summarise

if TYPE_CHECKING:
    from rich.table import Table

_NONE = "–"
_METRICS = {"accuracy": "accuracy", "f1": "F1", "auc": "AUC"}


def markdown(record: ProbeRecord) -> str:
    """`probe.md`: means over data sets, who wins, a row for each data set, and first letters."""
    subject = record.subject
    parts = [
        f"# Probes at `{subject['hook']}`",
        f"Dictionary `{subject['dictionary']['weights_sha256'][:12]}` ({subject['dictionary']['architecture']}, "
        f"{subject['dictionary']['d_in']:,} → {subject['dictionary']['d_sae']:,}) of `{subject['model'].get('name')}`.",
    ]
    results = record.results
    if results:
        parts += [
            f"## Means over {len(results)} data sets",
            _pipe_table(["", *_METRICS.values(), "AUC, shuffled labels", "best AUC on"], list(_summary_rows(record))),
            "± standard error over data sets. Probes are logistic regressions on test examples that neither choice nor "
            "fit has seen; of k latents or neurons, those whose class means differ most on the training examples.",
            "## One against another, by AUC",
            _pipe_table(["", "", "mean difference", "higher on", "lower on", "clearly higher", "clearly lower"],
                        list(_duel_rows(record))),
            "Clearly: by more than two standard errors, taken as if the two erred independently.",
            "## AUC by data set",
            _pipe_table(_data_set_head(record), list(_data_set_rows(record))),
            "± standard error over test examples (DeLong), averaged over the random splits. The last column is the "
            "largest class's share of all examples; data sets of more than two classes are averaged over classes.",
        ]  # fmt: skip
    if record.letters is not None:
        parts += ["## First letters", _letters_text(record.letters), _letters_table(record.letters)]
    if record.failures:
        parts += ["## Not probed", "\n".join(f"- {name}: {why}" for name, why in record.failures.items())]
    return "\n\n".join(parts) + "\n"


def summary_table(record: ProbeRecord) -> Table:
    """Means over data sets, for the terminal: what fits into 80 columns."""
    from rich import box
    from rich.table import Table

    count = len(record.results)
    title = next(iter(record.results)) if count == 1 else f"{count} data sets"
    table = Table(box=box.SIMPLE_HEAD, title=f"{record.subject['hook']}: probes on {title}")
    for name in ("", "accuracy", "AUC", "AUC, shuffled", "best on"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, accuracy, _, *others in _summary_rows(record):
        table.add_row(name, accuracy, *others)
    over = "test examples" if count == 1 else "data sets"
    table.caption = f"± standard error over {over}; F1 and each data set: {MARKDOWN_FILE}"
    return table


def letters_table(record: ProbeRecord) -> Table:
    """First letters, for the terminal."""
    from rich import box
    from rich.table import Table

    assert record.letters is not None
    table = Table(box=box.SIMPLE_HEAD, title=f"{record.subject['hook']}: first letters")
    for number, name in enumerate(_LETTER_HEAD):
        table.add_column(name, justify="left" if number == 0 else "right")
    for row in _letter_rows(record.letters):
        table.add_row(*row)
    table.caption = _letters_text(record.letters)
    return table


def _summary_rows(record: ProbeRecord) -> Iterable[list[str]]:
    results = record.results
    alone = next(iter(results.values())) if len(results) == 1 else None
    for method, summary in summarise(results).items():
        if alone is None:
            cells = [_pair(summary.means[metric]) for metric in METRICS]
        else:
            cells = [str(getattr(alone.methods[method].scores, metric)) for metric in METRICS]
        wins = _NONE if method == MAJORITY else f"{summary.wins} of {summary.data_sets}"
        null = _pair(summary.shuffled["auc"]) if summary.shuffled else _NONE
        if alone is not None and (shuffled := alone.methods[method].shuffled) is not None:
            null = str(shuffled.auc)
        yield [heading(method), *cells, null, wins]


def _duel_rows(record: ProbeRecord) -> Iterable[list[str]]:
    for one in duels(record.results):
        yield [
            heading(one.first), heading(one.second), _pair(one.difference, sign=True), str(one.wins), str(one.losses),
            str(one.clear_wins), str(one.clear_losses),
        ]  # fmt: skip


def _data_set_head(record: ProbeRecord) -> list[str]:
    methods = shown(method_order(record.results))
    return ["data set", "examples", *(heading(name) for name in methods), "latent", "majority"]


def _data_set_rows(record: ProbeRecord) -> Iterable[list[str]]:
    methods = shown(method_order(record.results))
    for name, result in sorted(record.results.items(), key=lambda item: _natural(item[0])):
        total = sum(result.examples.values())
        cells = [str(result.methods[method].scores.auc) if method in result.methods else _NONE for method in methods]
        best = result.methods.get("latents-1")
        chosen = best.columns[result.classes[0]][0] if best is not None and len(result.classes) == 1 else []
        majority = f"{max(result.examples.values()) / total:.2f}"
        yield [f"`{name}`", f"{total:,}", *cells, ", ".join(map(str, chosen)) or _NONE, majority]


_LETTER_HEAD = (
    "letter", "words", "F1, dense", "F1, main latents", "main latents", "silent", "absorption rate", "absorbing",
)  # fmt: skip


def _letters_table(letters: dict[str, Any]) -> str:
    return _pipe_table(list(_LETTER_HEAD), list(_letter_rows(letters)))


def _letter_rows(letters: dict[str, Any]) -> Iterable[list[str]]:
    for concept in letters["concepts"]:
        able = concept["able"]
        main = ", ".join(map(str, concept["main_latents"]))
        absorbing = ", ".join(f"{one['latent']} ({one['examples']}×)" for one in concept["absorbing_latents"][:3])
        yield [
            concept["name"], f"{concept['examples']:,}", _estimate(concept["dense_f1"]),
            *([_estimate(concept["main_f1"]), main] if able else ["not able", _NONE]),
            *([_estimate(concept[name]) if able else _NONE for name in ("silent_rate", "absorption_rate")]),
            (absorbing or _NONE) if able else _NONE,
        ]  # fmt: skip


def _letters_text(letters: dict[str, Any]) -> str:
    able, means = letters["able"], letters["means"]
    if not able:
        return f"None of {len(letters['concepts'])} letters has a dense probe of sufficient F1: not measured."
    return (
        f"{able} of {len(letters['concepts'])} letters have a dense probe of sufficient F1. Over these, ± standard "
        f"error over letters: absorption rate {_pair(means['rate'])}, main latents silent "
        f"{_pair(means['silent_rate'])}, main latents {_pair(means['splits'])}."
    )


def _estimate(record: dict[str, float | None]) -> str:
    if record["value"] is None:
        return _NONE
    error = record["standard_error"]
    return f"{record['value']:.3f} ± " + (_NONE if error is None else f"{error:.3f}")


def _pair(pair: Sequence[float | None] | None, *, sign: bool = False) -> str:
    if pair is None or pair[0] is None:
        return _NONE
    value = f"{pair[0]:+.3f}" if sign else f"{pair[0]:.3f}"
    return f"{value} ± " + (_NONE if pair[1] is None else f"{pair[1]:.3f}")


def _natural(name: str) -> list[Any]:
    """Names with their numbers in order: 5_… before 10_…."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _pipe_table(head: Sequence[str], rows: list[list[str]]) -> str:
    rule = [":--" if number == 0 else "--:" for number in range(len(head))]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in (list(head), rule, *rows)
    )
