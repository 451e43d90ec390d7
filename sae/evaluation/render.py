"""A report for people: Markdown with figures, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sae.evaluation.estimate import Estimate
from sae.evaluation.report import FIGURE_FOLDER, Report, Scores

if TYPE_CHECKING:
    from rich.table import Table

    from sae.evaluation.figures import Figure

_NONE = "–"
_HEADINGS = {"dictionary": "dictionary", "pca": "PCA", "random": "random", "identity": "identity"}
_RECONSTRUCTION = {
    "fvu": "fraction of variance unexplained",
    "explained_variance": "1 − fvu",
    "mse": "mean ‖x − x̂‖²",
    "cosine": "mean cos(x, x̂)",
    "l2_ratio": "mean ‖x̂‖ / ‖x‖",
    "relative_reconstruction_bias": "E‖x̂‖² / E[x·x̂]",
}
_SPARSITY = {"l0": "features per token", "l1": "mean Σ|f|"}
_DOWNSTREAM = {
    "ce_spliced": "loss with x̂ in place of x",
    "delta_ce": "spliced − clean",
    "ce_recovered_zero": "share of the loss of 0 recovered",
    "ce_recovered_mean": "share of the loss of x̄ recovered",
    "kl": "KL(clean ‖ spliced)",
}


def markdown(report: Report, figures: Sequence[Figure] | None) -> str:
    """`eval.md`: tables with standard errors, and the figures by relative links.

    Args:
        report: the evaluation.
        figures: drawn for it; None where matplotlib is missing.
    """
    parts = [
        f"# Evaluation at `{report.hook}`",
        _subject(report),
        "## Metrics",
        _pipe_table(["", "", *(_HEADINGS[name] for name in report.columns)], _rows(report)),
        "Values are means over tokens ± standard errors over documents. Baselines: " + _baselines(report) + ".",
        *_losses(report),
        "## Sparsity",
        _sparsity(report),
    ]
    if figures is None:
        parts.append("Figures are left out: they need matplotlib (`pip install 'sae[figures]'`).")
    elif figures:
        parts.append("## Figures")
        parts += [f"![{figure.title}]({FIGURE_FOLDER}/{figure.file})\n\n{figure.caption}" for figure in figures]
    return "\n\n".join(parts) + "\n"


def report_table(report: Report) -> Table:
    """The metrics, dictionary and baselines side by side."""
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD, title=f"{report.hook}: {report.tokens:,} held-out tokens of {report.documents:,} documents"
    )
    table.add_column("metric", no_wrap=True)
    for name in report.columns:
        table.add_column(_HEADINGS[name], justify="right")
    section = len(_RECONSTRUCTION)
    for number, (label, _, *cells) in enumerate(_rows(report)):
        if number in (section, section + len(_SPARSITY) + 2):
            table.add_section()
        table.add_row(label.strip("`"), *cells)
    table.caption = "\n".join(filter(None, ["± standard error over documents", fewer_tokens(report)]))
    return table


def _rows(report: Report) -> Iterator[list[str]]:
    """Label, meaning, and a cell for every column."""
    columns = list(report.columns.values())
    for name, meaning in _RECONSTRUCTION.items():
        yield [f"`{name}`", meaning, *(str(getattr(scores.reconstruction, name)) for scores in columns)]
    for name, meaning in _SPARSITY.items():
        yield [f"`{name}`", meaning, *(_cell(scores.sparsity, name) for scores in columns)]
    for name, meaning in {"dead": "features that never fire", "dense": "features on > 10 % of tokens"}.items():
        yield [f"`{name}`", meaning, *(_count(scores, name) for scores in columns)]
    if report.scores.downstream is not None:
        for name, meaning in _DOWNSTREAM.items():
            yield [f"`{name}`", meaning, *(_cell(scores.downstream, name) for scores in columns)]


def _cell(scores: Any, name: str) -> str:
    estimate: Estimate | None = None if scores is None else getattr(scores, name)
    return _NONE if estimate is None else str(estimate)


def _count(scores: Scores, name: str) -> str:
    if scores.sparsity is None:
        return _NONE
    count, features = getattr(scores.sparsity, name), len(scores.sparsity.firings)
    return f"{count:,} ({count / features:.1%})"


def _subject(report: Report) -> str:
    policy, dictionary = report.policy, report.dictionary
    masks = []
    if policy.masked_positions:
        count = policy.masked_positions
        masks.append(f"the first {'position' if count == 1 else f'{count} positions'} of every context")
    if policy.masked_ids:
        ids = ", ".join(map(str, policy.masked_ids[:8])) + (", …" if len(policy.masked_ids) > 8 else "")
        masks.append(f"special tokens (ids {ids})")
    masked = f"; left out are {report.masked:,} tokens: {' and '.join(masks)}" if masks else ""
    description = report.scores.description.removeprefix("dictionary: ")
    other = report.training_policy not in (None, policy)
    note = " **Training left out other tokens than this evaluation: see `token_policy` in eval.json.**" if other else ""
    return (
        f"Dictionary `{dictionary['weights_sha256'][:12]}` ({description}) on `{report.hook}` of "
        f"`{report.model.get('name', 'unknown model')}`, text {_text(report.data)}.\n\n"
        f"Evaluated on {report.tokens:,} held-out tokens of {report.documents:,} documents{masked}. "
        f"It took {report.seconds:,.1f} s.{note}"
    )


def _text(data: dict[str, Any]) -> str:
    source = data.get("source", "unknown")
    if isinstance(source, str):
        return f"`{source}`"
    return ", ".join(f"`{name}` ({share:.3g})" for name, share in zip(source, data["weights"], strict=True))


def _baselines(report: Report) -> str:
    return "; ".join(scores.description for scores in report.baselines.values())


def _losses(report: Report) -> list[str]:
    downstream = report.scores.downstream
    if downstream is None:
        return ["## Language-model loss", "Not measured: no language model was given."]
    rows = [
        ["untouched", "`ce_clean`", str(downstream.ce_clean)],
        ["the dictionary's x̂", "`ce_spliced`", str(downstream.ce_spliced)],
        ["the mean x̄", "`ce_mean`", str(downstream.ce_mean)],
        ["0", "`ce_zero`", str(downstream.ce_zero)],
    ]
    return [
        "## Language-model loss",
        _pipe_table(["hook point replaced by", "", "nats per token"], rows),
        f"Over {downstream.tokens:,} eligible positions with a next token, of {downstream.documents:,} documents. All "
        "replacements are made at the same eligible positions; the others keep the model's own activations."
        + _sentence(fewer_tokens(report)),
    ]


def fewer_tokens(report: Report) -> str:
    """Of which positions the baselines' losses are, where these are fewer than the dictionary's; else empty."""
    own = report.scores.downstream
    fewer = [scores.downstream for scores in report.baselines.values() if scores.downstream is not None]
    least = min(fewer, key=lambda scores: scores.tokens, default=own)
    if own is None or least is None or least.tokens == own.tokens:
        return ""
    return (
        f"losses of baselines, and the clean loss that they are beside: first {least.tokens:,} positions, of "
        f"{least.documents:,} documents"
    )


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


def _pipe_table(head: Sequence[str], rows: Iterator[list[str]] | list[list[str]]) -> str:
    rule = [":--" if number < 2 else "--:" for number in range(len(head))]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in (head, rule, *rows)
    )
