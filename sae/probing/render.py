"""Probe results for readers: Markdown, and tables for the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from sae.files.printable import printable
from sae.probing.record import MARKDOWN_FILE, ProbeRecord
from sae.probing.scores import METRICS, plus_minus
from sae.probing.sparse_probes import MAJORITY
from sae.probing.summary import duels, heading, method_order, shown, summarise
from sae.results.markdown import code, document, plain
from sae.results.table import NONE, Table

if TYPE_CHECKING:
    from rich.console import Group

_METRICS = {"accuracy": "accuracy", "f1": "F1", "auc": "AUC"}
_SUMMARY_HEAD = ("", *_METRICS.values(), "AUC, shuffled labels", "best AUC on")
_DUEL_HEAD = ("", "", "mean difference", "higher on", "lower on", "clearly higher", "clearly lower")
_LETTER_HEAD = (
    "letter", "words", "F1, dense", "F1, main latents", "main latents", "seen", "silent", "absorption rate",
    "absorbing",
)  # fmt: skip
_SHOWN_LATENTS = 3
_COUNTED = {
    "equal": "Texts equal to an earlier one, except for line ends and surrounding whitespace or in the tokens that "
    "are read, and on the same side of every split",
    "left_out": "Left out: no text, no label, or no token that counts",
}


def markdown(record: ProbeRecord) -> str:
    """The content of `probe.md`: means over data sets, wins, a row per data set, and first letters."""
    subject = record.subject
    parts = [
        f"# Probes at {code(subject['hook'])}",
        f"Dictionary {code(subject['dictionary']['weights_sha256'][:12])} ({subject['dictionary']['architecture']}, "
        f"{subject['dictionary']['d_in']:,} → {subject['dictionary']['d_sae']:,}) of "
        f"{code(subject['model'].get('name'))}.",
    ]
    if record.results:
        parts += _data_set(record) if len(record.results) == 1 else _data_sets(record)
    if record.letters is not None:
        parts += [
            "## First letters",
            _letters_text(record.letters),
            Table.of_rows(_LETTER_HEAD, _letter_rows(record.letters)).in_markdown(),
            "F1 on test words. Seen: test words of the letter that the dense probe detects; silent and absorbed "
            "are shares of these.",
        ]
    if record.failures:
        parts += ["## Not probed", "\n".join(f"- {plain(name)}: {plain(why)}" for name, why in record.failures.items())]
    return document(parts)


def summary_table(record: ProbeRecord, width: int | None = None) -> Group:
    """Means over data sets, for the terminal.

    Args:
        record: the probes' record.
        width: width of the terminal in characters; None: wide enough.
    """
    count = len(record.results)
    title = printable(next(iter(record.results))) if count == 1 else f"{count} data sets"
    rows = [[name, accuracy, *others] for name, accuracy, _, *others in _summary_rows(record)]
    over = "test examples" if count == 1 else "data sets"
    return Table.of_rows(
        ("", "accuracy", "AUC", "AUC,\nshuffled", "best on"), rows,
        title=f"{record.subject['hook']}: probes on {title}",
        notes=[f"± standard error over {over}{_without_error(rows)}; F1 and each data set: {MARKDOWN_FILE}"],
    ).in_terminal(width)  # fmt: skip


def letters_table(record: ProbeRecord, width: int | None = None) -> Group:
    """First letters, for the terminal: counts of words."""
    assert record.letters is not None
    rows = []
    for concept in record.letters["concepts"]:
        dense = _estimate(concept["dense_f1"], 2)
        counts = [f"{concept[name]} of {concept['positives']}" for name in ("silent", "absorbed")]
        cells = [_estimate(concept["main_f1"], 2), _main_latents(concept), *counts]
        rows.append([concept["name"], dense, *(cells if concept["able"] else ["not able", NONE, NONE, NONE])])
    return Table.of_rows(
        ("letter", "F1, dense", "F1, main", "main latents", "silent", "absorbed"), rows,
        title=f"{record.subject['hook']}: first letters",
        notes=[f"{_letters_text(record.letters)} Rates with errors: {MARKDOWN_FILE}"],
    ).in_terminal(width)  # fmt: skip


def _data_sets(record: ProbeRecord) -> list[str]:
    """Sections for several data sets."""
    rows = list(_summary_rows(record))
    return [
        f"## Means over {len(record.results)} data sets",
        Table.of_rows(_SUMMARY_HEAD, rows).in_markdown(),
        f"± standard error over data sets{_without_error(rows)}. {_how(record)}",
        "## One against another, by AUC",
        Table.of_rows(_DUEL_HEAD, _duel_rows(record)).in_markdown(),
        "Clearly: by more than two standard errors, as if the errors of the two were independent.",
        "## AUC by data set",
        Table.of_rows(_data_set_head(record), _data_set_rows(record)).in_markdown(),
        "± standard error over test examples (DeLong), averaged over the random splits; 0 if every positive is above "
        "every negative, which is not certainty. The last column is the largest class's share of all examples; "
        "data sets with more than two classes are averaged over classes.",
        *_counted(record),
    ]


def _data_set(record: ProbeRecord) -> list[str]:
    """Sections for a single data set."""
    [(name, result)] = record.results.items()
    rows = list(_summary_rows(record))
    best = result.methods["latents-1"].columns if "latents-1" in result.methods else {}
    latents = "; ".join(
        f"{plain(repr(label))}: {', '.join(str(columns[0]) for columns in splits)}" for label, splits in best.items()
    )
    return [
        f"## {code(name)}",
        Table.of_rows(_SUMMARY_HEAD[:-1], [row[:-1] for row in rows]).in_markdown(),
        f"{sum(result.examples.values()):,} examples. ± standard error over test examples (of AUC: DeLong), averaged "
        f"over the random splits{_without_error(rows)}. {_how(record)}",
        *([f"Best latent in each split, for {latents}."] if latents else []),
        *_counted(record),
    ]


def _counted(record: ProbeRecord) -> list[str]:
    """Sentences with the numbers of equal texts and of those left out, if there are any."""
    sentences = []
    probed = {name: entry for name, entry in record.entries.items() if entry.result is not None}
    for kind, meaning in _COUNTED.items():
        counts = {name: getattr(entry, kind) for name, entry in probed.items() if getattr(entry, kind)}
        shown = [f"{code(name)} {count:,}" if len(probed) > 1 else f"{count:,}" for name, count in counts.items()]
        sentences += [f"{meaning}: {', '.join(shown)}."] if shown else []
    return sentences


def _without_error(rows: Iterable[Sequence[str]]) -> str:
    """The meaning of a dash after ±, if there is one."""
    return f" ({NONE} if there are too few)" if any(f"± {NONE}" in cell for row in rows for cell in row) else ""


def _how(record: ProbeRecord) -> str:
    settings = next(entry.settings for entry in record.entries.values() if entry.result is not None)
    unit = ", in standard deviations," if settings["ranking"] == "standardised" else ""
    return (
        "Probes are logistic regressions on test examples that neither choice nor fit has seen; of k latents or "
        f"neurons, those whose class means differ most{unit} on the training examples."
    )


def _summary_rows(record: ProbeRecord) -> Iterable[list[str]]:
    results = record.results
    alone = next(iter(results.values())) if len(results) == 1 else None
    for method, summary in summarise(results).items():
        if alone is None:
            cells = [_pair(summary.means[metric]) for metric in METRICS]
        else:
            cells = [str(getattr(alone.methods[method].scores, metric)) for metric in METRICS]
        wins = NONE if method == MAJORITY else f"{summary.wins} of {summary.data_sets}"
        null = _pair(summary.shuffled["auc"]) if summary.shuffled else NONE
        if alone is not None and (shuffled := alone.methods[method].shuffled) is not None:
            null = str(shuffled.auc)
        yield [heading(method), *cells, null, wins]


def _duel_rows(record: ProbeRecord) -> Iterable[list[str]]:
    for duel in duels(record.results):
        yield [
            heading(duel.first), heading(duel.second), _pair(duel.difference, sign=True), str(duel.wins),
            str(duel.losses), str(duel.clear_wins), str(duel.clear_losses),
        ]  # fmt: skip


def _data_set_head(record: ProbeRecord) -> list[str]:
    methods = shown(method_order(record.results))
    return ["data set", "examples", *(heading(name) for name in methods), "latent", "majority"]


def _data_set_rows(record: ProbeRecord) -> Iterable[list[str]]:
    methods = shown(method_order(record.results))
    for name, result in sorted(record.results.items(), key=lambda item: _natural(item[0])):
        total = sum(result.examples.values())
        cells = [str(result.methods[method].scores.auc) if method in result.methods else NONE for method in methods]
        best = result.methods.get("latents-1")
        chosen = best.columns[result.classes[0]][0] if best is not None and len(result.classes) == 1 else []
        majority = f"{max(result.examples.values()) / total:.2f}"
        yield [code(name), f"{total:,}", *cells, ", ".join(map(str, chosen)) or NONE, majority]


def _letter_rows(letters: dict[str, Any]) -> Iterable[list[str]]:
    for concept in letters["concepts"]:
        latents = concept["absorbing_latents"][:_SHOWN_LATENTS]
        absorbing = ", ".join(f"{latent['latent']} ({latent['examples']}×)" for latent in latents)
        cells = [
            _estimate(concept["main_f1"]), _main_latents(concept), str(concept["positives"]),
            _estimate(concept["silent_rate"]), _estimate(concept["absorption_rate"]), absorbing or NONE,
        ]  # fmt: skip
        head = [concept["name"], f"{concept['examples']:,}", _estimate(concept["dense_f1"])]
        yield [*head, *(cells if concept["able"] else ["not able", *[NONE] * 5])]


def _main_latents(letter: dict[str, Any]) -> str:
    latents = list(map(str, letter["main_latents"]))
    return ", ".join(latents[:_SHOWN_LATENTS] + (["…"] if len(latents) > _SHOWN_LATENTS else []))


def _letters_text(letters: dict[str, Any]) -> str:
    able, count, means = letters["able"], len(letters["concepts"]), letters["means"]
    if not able:
        return f"None of {count} letters has a dense probe with sufficient F1 on validation words: not measured."
    return (
        f"{able} of {count} letters have a dense probe with sufficient F1 on validation words. Over these, ± standard "
        f"error over letters: absorption rate {_pair(means['rate'])}, main latents silent "
        f"{_pair(means['silent_rate'])}, main latents {_pair(means['splits'])}."
    )


def _estimate(record: dict[str, float | None], decimals: int = 3) -> str:
    return plus_minus(record["value"], record["standard_error"], decimals)


def _pair(pair: Sequence[float | None] | None, *, sign: bool = False) -> str:
    return NONE if pair is None else plus_minus(pair[0], pair[1], sign=sign)


def _natural(name: str) -> list[Any]:
    """Sort key that orders numbers in names by value: 5_… before 10_…."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
