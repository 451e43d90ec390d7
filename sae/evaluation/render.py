"""A report for people: Markdown with figures, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sae.evaluation.estimate import Estimate
from sae.evaluation.legacy import CONTEXTS_PER_BATCH
from sae.evaluation.report import FIGURE_FOLDER, HEADINGS, Report
from sae.tokens import TokenPolicy

if TYPE_CHECKING:
    from rich.table import Table

    from sae.evaluation.figures import Figure

NONE = "–"
WIDE = 120
RECONSTRUCTION = {
    "fvu": "fraction of variance unexplained",
    "explained_variance": "1 − fvu",
    "mse": "mean ‖x − x̂‖²",
    "cosine": "mean cos(x, x̂)",
    "l2_ratio": "mean ‖x̂‖ / ‖x‖",
    "relative_reconstruction_bias": "E‖x̂‖² / E[x·x̂]",
}
SPARSITY = {"l0": "features per token", "l1": "mean Σ|f|"}
COUNTS = {"dead": "features that never fire", "dense": "features on > 10 % of tokens"}
DOWNSTREAM = {
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
        pipe_table(["", "", *(HEADINGS[name] for name in report.columns)], _rows(report)),
        "Values are means over tokens ± standard errors over documents. Baselines: " + _baselines(report) + ".",
        *_losses(report),
        "## Sparsity",
        _sparsity(report),
        *_legacy(report),
    ]
    if figures is None:
        parts.append("Figures are left out: they need matplotlib (`pip install 'sae[figures]'`).")
    elif figures:
        parts.append("## Figures")
        parts += [f"![{figure.title}]({FIGURE_FOLDER}/{figure.file})\n\n{figure.caption}" for figure in figures]
    return "\n\n".join(parts) + "\n"


def report_table(report: Report, width: int | None = None) -> Table:
    """The metrics, dictionary and baselines side by side.

    Args:
        report: the evaluation.
        width: characters of the terminal; below 120, baselines come without their standard errors, so that no cell has
            to be broken. None: it is wide enough.
    """
    from rich import box
    from rich.table import Table

    narrow = width is not None and width < WIDE
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 0 if narrow else 1),
        pad_edge=False,
        show_edge=not narrow,
        title=f"{report.hook}: {report.tokens:,} held-out tokens of {report.documents:,} documents",
    )
    table.add_column("metric", no_wrap=True)
    for name in report.columns:
        heading = "x̂ = x" if narrow and name == "identity" else HEADINGS[name]
        table.add_column(heading, justify="right", no_wrap=name not in report.baselines)
    section = len(RECONSTRUCTION)
    for number, (label, _, *cells) in enumerate(_rows(report, short_baselines=narrow)):
        if number in (section, section + len(SPARSITY) + len(COUNTS)):
            table.add_section()
        table.add_row(label.strip("`"), *cells)
    errors = "± standard error over documents" + ("; those of the baselines are in eval.md" if narrow else "")
    table.caption = "\n".join(filter(None, [errors, fewer_tokens(report)]))
    return table


def _rows(report: Report, *, short_baselines: bool = False) -> Iterator[list[str]]:
    """Label, meaning, and a cell for every column; short ones are without errors and shares."""
    columns = [(scores, short_baselines and name in report.baselines) for name, scores in report.columns.items()]

    def cells(part: str, name: str) -> Iterator[str]:
        for scores, short in columns:
            estimate: Estimate = getattr(getattr(scores, part), name, Estimate(None, None))
            yield estimate.short() if short else str(estimate)

    def counts(name: str) -> Iterator[str]:
        for scores, short in columns:
            if scores.sparsity is None:
                yield NONE
                continue
            count = getattr(scores.sparsity, name)
            yield f"{count:,}" if short else share_of(count, len(scores.sparsity.firings))

    for name, meaning in RECONSTRUCTION.items():
        yield [f"`{name}`", meaning, *cells("reconstruction", name)]
    for name, meaning in SPARSITY.items():
        yield [f"`{name}`", meaning, *cells("sparsity", name)]
    for name, meaning in COUNTS.items():
        yield [f"`{name}`", meaning, *counts(name)]
    if report.scores.downstream is not None:
        for name, meaning in DOWNSTREAM.items():
            yield [f"`{name}`", meaning, *cells("downstream", name)]


def share_of(count: int, features: int) -> str:
    """A number of features, and their share of all."""
    return f"{count:,} ({count / features:.1%})"


def describe_masks(policy: TokenPolicy) -> str:
    """Which tokens a policy leaves out; empty where it leaves out none."""
    masks = []
    if policy.masked_positions:
        count = policy.masked_positions
        masks.append(f"the first {'position' if count == 1 else f'{count} positions'} of every context")
    if policy.masked_ids:
        ids = ", ".join(map(str, policy.masked_ids[:8])) + (", …" if len(policy.masked_ids) > 8 else "")
        masks.append(f"special tokens (ids {ids})")
    return " and ".join(masks)


def _subject(report: Report) -> str:
    masks = describe_masks(report.policy)
    masked = f"; left out are {report.masked:,} tokens: {masks}" if masks else "; no token is left out"
    description = report.scores.description.removeprefix("dictionary: ")
    other = report.training_policy not in (None, report.policy)
    weights = report.dictionary["weights_sha256"]
    which = f" `{weights[:12]}`" if weights else ""
    note = " **Training left out other tokens than this evaluation: see `token_policy` in eval.json.**" if other else ""
    return (
        f"Dictionary{which} ({description}) on `{report.hook}` of "
        f"`{report.model.get('name', 'unknown model')}`, text {describe_text(report.data)}.\n\n"
        f"Evaluated on {report.tokens:,} held-out tokens of {report.documents:,} documents{masked}. "
        f"It took {report.seconds:,.1f} s.{note}"
    )


def describe_text(data: dict[str, Any]) -> str:
    """Which text it is, with the shares where there are several sources."""
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
        pipe_table(["hook point replaced by", "", "nats per token"], rows),
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
        f"What the formulas of other packages give on the first {legacy.tokens:,} held-out tokens whose id is not a "
        f"special one, in batches of {CONTEXTS_PER_BATCH} contexts. They are not the metrics above, even where they "
        "are called the same: `sae/evaluation/legacy.py` has each equation, and how it differs. Beside the dictionary "
        "stands what they give for x̂ = x̄, which explains nothing.",
        pipe_table(head, rows, text_columns=1),
    ]


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.5g}"


def pipe_table(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 2) -> str:
    """A Markdown table, the first columns to the left."""
    rule = [":--" if number < text_columns else "--:" for number in range(len(head))]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in (head, rule, *rows)
    )
