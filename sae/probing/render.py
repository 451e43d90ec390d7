"""Probes for people: Markdown, and tables for the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from sae.files.printable import printable
from sae.probing.record import MARKDOWN_FILE, ProbeRecord
from sae.probing.scores import METRICS
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
    "equal": "Texts that equal one before them, but for line ends and space around them or in the tokens that are "
    "read, and are on its side of every split",
    "left_out": "Left out, without text, without label, or without a token that counts",
}


def markdown(record: ProbeRecord) -> str:
    """`probe.md`: means over data sets, who wins, a row for each data set, and first letters."""
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
            "F1 on test words. Seen: test words of the letter in which the dense probe sees it; silent and absorbed "
            "are shares of these.",
        ]
    if record.failures:
        parts += ["## Not probed", "\n".join(f"- {plain(name)}: {plain(why)}" for name, why in record.failures.items())]
    return document(parts)


def summary_table(record: ProbeRecord, width: int | None = None) -> Group:
    """Means over data sets, for the terminal.

    Args:
        record: of probes.
        width: characters of the terminal; None: it is wide enough.
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
    for one in record.letters["concepts"]:
        dense = _estimate(one["dense_f1"], 2)
        counts = [f"{one[name]} of {one['positives']}" for name in ("silent", "absorbed")]
        measured = [_estimate(one["main_f1"], 2), _main_latents(one), *counts]
        rows.append([one["name"], dense, *(measured if one["able"] else ["not able", NONE, NONE, NONE])])
    return Table.of_rows(
        ("letter", "F1, dense", "F1, main", "main latents", "silent", "absorbed"), rows,
        title=f"{record.subject['hook']}: first letters",
        notes=[f"{_letters_text(record.letters)} Rates with errors: {MARKDOWN_FILE}"],
    ).in_terminal(width)  # fmt: skip


def _data_sets(record: ProbeRecord) -> list[str]:
    """Sections on several data sets."""
    rows = list(_summary_rows(record))
    return [
        f"## Means over {len(record.results)} data sets",
        Table.of_rows(_SUMMARY_HEAD, rows).in_markdown(),
        f"± standard error over data sets{_without_error(rows)}. {_how(record)}",
        "## One against another, by AUC",
        Table.of_rows(_DUEL_HEAD, _duel_rows(record)).in_markdown(),
        "Clearly: by more than two standard errors, taken as if the two erred independently.",
        "## AUC by data set",
        Table.of_rows(_data_set_head(record), _data_set_rows(record)).in_markdown(),
        "± standard error over test examples (DeLong), averaged over the random splits; 0 where every positive is "
        "above every negative, which is not certainty. The last column is the largest class's share of all examples; "
        "data sets of more than two classes are averaged over classes.",
        *_counted(record),
    ]


def _data_set(record: ProbeRecord) -> list[str]:
    """Sections on the only one."""
    [(name, result)] = record.results.items()
    rows = list(_summary_rows(record))
    best = result.methods["latents-1"].columns if "latents-1" in result.methods else {}
    latents = "; ".join(
        f"{plain(repr(label))}: {', '.join(str(one[0]) for one in splits)}" for label, splits in best.items()
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
    """How many texts are equal, and how many were left out, where there are any."""
    found = []
    probed = {name: entry for name, entry in record.entries.items() if entry.result is not None}
    for kind, meaning in _COUNTED.items():
        counts = {name: getattr(entry, kind) for name, entry in probed.items() if getattr(entry, kind)}
        shown = [f"{code(name)} {count:,}" if len(probed) > 1 else f"{count:,}" for name, count in counts.items()]
        found += [f"{meaning}: {', '.join(shown)}."] if shown else []
    return found


def _without_error(rows: Iterable[Sequence[str]]) -> str:
    """What a dash after ± means, where there is one."""
    return f" ({NONE} where they are too few)" if any(f"± {NONE}" in cell for row in rows for cell in row) else ""


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
        cells = [str(result.methods[method].scores.auc) if method in result.methods else NONE for method in methods]
        best = result.methods.get("latents-1")
        chosen = best.columns[result.classes[0]][0] if best is not None and len(result.classes) == 1 else []
        majority = f"{max(result.examples.values()) / total:.2f}"
        yield [code(name), f"{total:,}", *cells, ", ".join(map(str, chosen)) or NONE, majority]


def _letter_rows(letters: dict[str, Any]) -> Iterable[list[str]]:
    for one in letters["concepts"]:
        absorbing = ", ".join(f"{j['latent']} ({j['examples']}×)" for j in one["absorbing_latents"][:_SHOWN_LATENTS])
        measured = [
            _estimate(one["main_f1"]), _main_latents(one), str(one["positives"]), _estimate(one["silent_rate"]),
            _estimate(one["absorption_rate"]), absorbing or NONE,
        ]  # fmt: skip
        dense = _estimate(one["dense_f1"])
        yield [one["name"], f"{one['examples']:,}", dense, *(measured if one["able"] else ["not able", *[NONE] * 5])]


def _main_latents(letter: dict[str, Any]) -> str:
    latents = list(map(str, letter["main_latents"]))
    return ", ".join(latents[:_SHOWN_LATENTS] + (["…"] if len(latents) > _SHOWN_LATENTS else []))


def _letters_text(letters: dict[str, Any]) -> str:
    able, count, means = letters["able"], len(letters["concepts"]), letters["means"]
    if not able:
        return f"None of {count} letters has a dense probe of sufficient F1 on validation words: not measured."
    return (
        f"{able} of {count} letters have a dense probe of sufficient F1 on validation words. Over these, ± standard "
        f"error over letters: absorption rate {_pair(means['rate'])}, main latents silent "
        f"{_pair(means['silent_rate'])}, main latents {_pair(means['splits'])}."
    )


def _estimate(record: dict[str, float | None], decimals: int = 3) -> str:
    value, error = record["value"], record["standard_error"]
    if value is None:
        return NONE
    return f"{value:.{decimals}f} ± " + (NONE if error is None else f"{error:.{decimals}f}")


def _pair(pair: Sequence[float | None] | None, *, sign: bool = False) -> str:
    if pair is None or pair[0] is None:
        return NONE
    value = f"{pair[0]:+.3f}" if sign else f"{pair[0]:.3f}"
    return f"{value} ± " + (NONE if pair[1] is None else f"{pair[1]:.3f}")


def _natural(name: str) -> list[Any]:
    """Names with their numbers in order: 5_… before 10_…."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
