"""A report as Markdown with figures, and as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sae.dictionary.token_policy import TokenPolicy
from sae.evaluation.metrics import METRICS
from sae.evaluation.published_formulas import CONTEXTS_PER_BATCH
from sae.evaluation.published_view import published_markdown, published_note
from sae.evaluation.report import FIGURE_FOLDER, HEADINGS, MARKDOWN_FILE, Report, fewest_of_baselines, place_of
from sae.model.tail import NO_ROAD, Road
from sae.results.estimate import Estimate, error_note
from sae.results.figure import MISSING
from sae.results.markdown import code, document, pipe_table, plain
from sae.results.table import NONE, Column, Table

if TYPE_CHECKING:
    from rich.console import Group

    from sae.evaluation.figures import Figure

COUNTS = {"dead": "features that never fire", "dense": "features on > 10 % of tokens"}


def table_rows() -> dict[str, str]:
    """Names and meanings of a table's rows: the metrics, with the counts of features before the losses."""
    meanings = {name: metric.meaning for name, metric in METRICS.items()}
    losses = {name: meanings.pop(name) for name, metric in METRICS.items() if metric.group == "losses"}
    return {**meanings, **COUNTS, **losses}


def sections(names: Sequence[str]) -> set[int]:
    """The rows of a table at which a group of metrics begins."""
    groups = ["sparsity" if name in COUNTS else METRICS[name].group for name in names]
    return {number for number in range(1, len(groups)) if groups[number] != groups[number - 1]}


def markdown(report: Report, figures: Sequence[Figure] | None) -> str:
    """`eval.md`: tables with standard errors, and the figures by relative links.

    Args:
        report: the evaluation.
        figures: drawn for it; None if matplotlib is missing.
    """
    record = report.to_json()
    parts = [
        f"# Evaluation at {code(place_of(record))}",
        _subject(report),
        "## Metrics",
        metrics_markdown(record),
        f"Values are means over tokens, {error_note(report.to_json()['evaluated'])}. Baselines: {_baselines(report)}."
        + _of_target(report)
        + _sentence(fewer_tokens(record)),
        *_losses(report),
        "## Sparsity",
        _sparsity(report),
        *published_markdown(report.to_json()),
        *_legacy(report),
    ]
    if figures is None:
        parts.append(MISSING)
    elif figures:
        parts.append("## Figures")
        parts += [f"![{figure.title}]({FIGURE_FOLDER}/{figure.file})\n\n{figure.caption}" for figure in figures]
    return document(parts)


def metrics_markdown(record: Mapping[str, Any]) -> str:
    """The metrics as Markdown, dictionary and baselines side by side.

    Args:
        record: the content of `eval.json`.
    """
    columns = [HEADINGS[name] for name in ("dictionary", *record["baselines"])]
    return pipe_table(["", "", *columns], _rows(record))


def report_table(report: Report | Mapping[str, Any], width: int | None = None) -> Group:
    """The metrics, dictionary and baselines side by side; on a narrow terminal baselines without standard errors.

    Args:
        report: the evaluation, or the content of its `eval.json`.
        width: of the terminal, in characters; None: wide enough.
    """
    record = report.to_json() if isinstance(report, Report) else report
    counts = record["evaluated"]
    rows = list(_metric_rows(record))
    metrics = Column("metric", [metric for metric, _ in rows], is_text=True)
    columns = [
        Column(
            HEADINGS[name].replace(" ", "\n"),
            [str(cells[number]) for _, cells in rows],
            None if name == "dictionary" else [_shortened(cells[number]) for _, cells in rows],
        )
        for number, name in enumerate(("dictionary", *record["baselines"]))
    ]
    return Table(
        [metrics, *columns],
        title=f"{place_of(record)}: {counts['tokens']:,} held-out tokens of {counts['documents']:,} documents",
        notes=[error_note(counts), fewer_tokens(record), _without_losses(record), published_note(record)],
        short_note=f"standard errors of the baselines are in {MARKDOWN_FILE}",
        sections=sections([metric for metric, _ in rows]),
    ).in_terminal(width)


def _metric_rows(record: Mapping[str, Any]) -> Iterator[tuple[str, list[Estimate | _Count | str]]]:
    """The name of each metric, and its values for the dictionary and every baseline."""
    records = [record, *record["baselines"].values()]
    for name in table_rows():
        if name in COUNTS:
            yield name, [NONE if not entry["features"] else _Count(entry[name]["features"], entry["features"])
                         for entry in records]  # fmt: skip
        elif not METRICS[name].is_common and (METRICS[name].group != "losses" or _has_losses(record)):
            yield name, [_recorded(entry, name) for entry in records]


def _has_losses(record: Mapping[str, Any]) -> bool:
    """Whether losses of the language model were measured."""
    return record["evaluated"]["downstream_tokens"] is not None


@dataclass(frozen=True)
class _Count:
    """A number of features out of all."""

    count: int
    features: int

    def __str__(self) -> str:
        return share_of(self.count, self.features)


def _recorded(record: Mapping[str, Any], metric: str) -> Estimate:
    return Estimate.from_json(record[metric]) if record.get(metric) else Estimate(None, None)


def _shortened(cell: Estimate | _Count | str) -> str:
    if isinstance(cell, Estimate):
        return cell.short()
    return f"{cell.count:,}" if isinstance(cell, _Count) else cell


def _rows(record: Mapping[str, Any]) -> Iterator[list[str]]:
    """Label, meaning, and a cell for every column."""
    meanings = table_rows()
    for metric, cells in _metric_rows(record):
        yield [f"`{metric}`", meanings[metric], *map(str, cells)]


def share_of(count: int, features: int) -> str:
    """A number of features, and their share of all."""
    return f"{count:,} ({count / features:.1%})"


def describe_masks(policy: TokenPolicy) -> str:
    """Which tokens a policy leaves out; empty if it leaves out none."""
    masks = []
    if policy.masked_positions:
        count = policy.masked_positions
        masks.append(f"the first {'position' if count == 1 else f'{count} positions'} of every context")
    if policy.masked_ids:
        ids = ", ".join(map(str, policy.masked_ids[:8])) + (", …" if len(policy.masked_ids) > 8 else "")
        masks.append(f"special tokens (ids {ids})")
    if policy.chat_roles is not None:
        masks.append(f"in chats, everything not said by {' or '.join(policy.chat_roles)}")
    return " and ".join(masks)


def _subject(report: Report) -> str:
    masks = describe_masks(report.policy)
    masked = f"; left out are {report.masked:,} tokens: {masks}" if masks else "; no token is left out"
    description = report.scores.description.removeprefix("dictionary: ")
    other = report.training_policy not in (None, report.policy)
    weights = report.dictionary["weights_sha256"]
    which = f" {code(weights[:12])}" if weights else ""
    note = " **Training left out other tokens than this evaluation: see `token_policy` in eval.json.**" if other else ""
    return (
        f"Dictionary{which} ({plain(description)}) on {code(place_of(report.to_json()))} of "
        f"{code(report.model.get('name', 'unknown model'))}, text {describe_text(report.data)}.\n\n"
        f"Evaluated on {report.tokens:,} held-out tokens of {report.documents:,} documents{masked}. "
        f"It took {report.seconds:,.1f} s.{note}"
    )


def describe_text(data: dict[str, Any]) -> str:
    """The name of the text, with shares if there are several sources."""
    source = data.get("source", "unknown")
    if isinstance(source, str):
        return code(source)
    return ", ".join(f"{code(name)} ({share:.3g})" for name, share in zip(source, data["weights"], strict=True))


def _baselines(report: Report) -> str:
    return "; ".join(plain(scores.description) for scores in report.baselines.values())


def _of_target(report: Report) -> str:
    """Of a transcoder, which baselines read the target instead of the input."""
    reads = report.dictionary.get("reads")
    return f" PCA and the identity read the target, not {code(reads)}." if reads else ""


def _losses(report: Report) -> list[str]:
    downstream = report.scores.downstream
    if downstream is None:
        reason = _sentence(plain(report.road)) if report.road else " Not measured: no language model was given."
        return ["## Language-model loss", reason[1:]]
    rows = [
        ["untouched", "`ce_clean`", str(downstream.ce_clean)],
        ["the dictionary's x̂", "`ce_spliced`", str(downstream.ce_spliced)],
        ["the mean x̄", "`ce_mean`", str(downstream.ce_mean)],
        ["0", "`ce_zero`", str(downstream.ce_zero)],
    ]
    return [
        "## Language-model loss",
        pipe_table(["hook point replaced by", "", "nats per token"], rows),
        f"Over {downstream.tokens:,} eligible positions with a next token, of {downstream.documents:,} documents. All "
        "replacements are made at the same eligible positions; the others keep the model's own activations."
        + (_sentence(plain(report.road)) if report.road else ""),
    ]


def fewer_tokens(record: Mapping[str, Any]) -> str:
    """A note if the baselines are measured on fewer tokens than the dictionary; else empty.

    Args:
        record: the content of `eval.json`.
    """
    fewest = {key: fewest_of_baselines([record], key) for key in ("tokens", "downstream_tokens")}
    return baselines_have_fewer(record["evaluated"], fewest["tokens"], fewest["downstream_tokens"])


def baselines_have_fewer(evaluated: Mapping[str, Any], tokens: int | None, positions: int | None) -> str:
    """A note if the baselines have fewer tokens, or fewer positions for losses, than the dictionary; else empty.

    Args:
        evaluated: numbers for the dictionary, by the names of `eval.json`.
        tokens: number for the baselines' reconstruction; None: unknown.
        positions: number for their losses; None: not measured.
    """
    parts = []
    if tokens is not None and tokens != evaluated["tokens"]:
        parts.append(f"reconstruction and sparsity on {tokens:,} tokens")
    if positions is not None and positions != evaluated["downstream_tokens"]:
        parts.append(f"losses, and the clean loss next to them, on {positions:,} positions")
    return f"baselines are measured on less: {'; '.join(parts)}" if parts else ""


def _without_losses(record: Mapping[str, Any]) -> str:
    """Why there are no losses although a language model was given; empty if there are."""
    road = record.get("road")
    return str(Road(**road)) if road and road["name"] == NO_ROAD else ""


def _sentence(note: str) -> str:
    return f" {note[0].upper()}{note[1:]}." if note else ""


def _sparsity(report: Report) -> str:
    sparsity = report.scores.sparsity
    assert sparsity is not None
    features = len(sparsity.firings)
    low, high = sparsity.l0_quantiles["0"], sparsity.l0_quantiles["1"]
    quantiles = {share: f"{count:,}" for share, count in sparsity.l0_quantiles.items()}
    spread = (
        f"from {low:,} to {high:,}, half of them {quantiles['0.5']} or fewer, the middle 90 % {quantiles['0.05']} to "
        f"{quantiles['0.95']}"
    )
    lines = [
        f"- L0 over tokens: {f'{low:,} for each of them' if low == high else spread}.",
        f"- {sparsity.dead:,} of {features:,} features ({sparsity.dead / features:.1%}) fire on none of the "
        f"{sparsity.tokens:,} tokens; the more tokens, the fewer.",
        f"- {sparsity.dense:,} features fire on more than 10 % of the tokens.",
    ]
    if report.dead_in_training is not None:
        lines.insert(
            2,
            f"- {report.dead_in_training['features']:,} had not fired for {report.dead_in_training['tokens']:,} tokens "
            "when training ended.",
        )
    return "\n".join(lines)


def _legacy(report: Report) -> list[str]:
    legacy, title = report.legacy, "## For comparison with published numbers only"
    if "reads" in report.dictionary:
        return [title, "Nothing: the formulas of other packages are for dictionaries that give what they read."]
    if legacy is None:
        return []
    columns = [part[package] for part in (legacy.of, legacy.mean_predictor) for package in part]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[f"`{name}`", *(_number(column.get(name)) for column in columns)] for name in names]
    head = ["", *legacy.of, *(f"x̂ = x̄, {package}" for package in legacy.mean_predictor)]
    return [
        title,
        f"Values by the formulas of other packages on the first {legacy.tokens:,} held-out tokens whose id is not a "
        f"special one, in batches of {CONTEXTS_PER_BATCH} contexts. They are not the metrics above, even if they have "
        "the same name: `sae/evaluation/published_formulas.py` has each equation, and how it differs. Next to the "
        "dictionary are the values for x̂ = x̄, which explains nothing.",
        pipe_table(head, rows, text_columns=1),
    ]


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.5g}"
