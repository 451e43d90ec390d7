"""Effects as text for readers: a terminal table, a few lines for one feature, Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from sae.effects.effects import Correlation, Effects, EffectSettings, FeatureEffect, TokenChange
from sae.features.text import visible
from sae.results.estimate import Estimate, error_note
from sae.results.markdown import code, document, plain
from sae.results.table import NONE, Column, Table

if TYPE_CHECKING:
    from rich.console import Group

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_ROWS_IN_MARKDOWN = 100
_WIDE = 100


def what_is_done(settings: EffectSettings) -> str:
    """`ablated`, `doubled` or the factor."""
    return {0.0: "ablated", 2.0: "doubled"}.get(settings.scale, f"times {settings.scale:g}")


def effects_table(effects: Effects, sort: str = "kl", limit: int | None = None, width: int | None = None) -> Group:
    """A terminal table of the first features sorted by a column; token text is never markup.

    Args:
        effects: effects of some features.
        sort: one of `SORT_COLUMNS`.
        limit: maximum number of rows; None: all.
        width: width of the terminal in characters; below 100, density and following positions are left out. None: wide
            enough.

    Raises:
        ConfigError: there is no such column.
    """
    from rich.text import Text

    settings, chosen = effects.settings, effects.sorted_by(sort)[:limit]
    with_errors = {"Δ loss": [effect.loss for effect in chosen], "KL": [effect.kl for effect in chosen]}
    numbers = {
        "density": [f"{effect.density:.2%}" for effect in chosen],
        "Δ loss": [],
        f"next {settings.window}": [_short(effect.loss_after) for effect in chosen],
        "direct": [_short(effect.direct) for effect in chosen],
        "KL": [],
        "random": [_short(effect.random_kl) for effect in chosen],
    }
    if width is not None and width < _WIDE:
        del numbers["density"], numbers[f"next {settings.window}"]
    columns = [
        Column(name, [str(estimate) for estimate in with_errors[name]], [*map(_short, with_errors[name])])
        if name in with_errors else Column(name, cells)
        for name, cells in numbers.items()
    ]  # fmt: skip
    separator = Text(" ", no_wrap=True, overflow="ellipsis")
    tokens = [
        separator.join(Text(visible(change.token), style="on grey23") for change in effect.raised) for effect in chosen
    ]
    feature = Column("feature", [str(effect.feature) for effect in chosen])
    columns = [feature, *columns, Column("more likely then", tokens, is_text=True, is_cut=True)]
    return Table(columns, f"{effects.place}: features {what_is_done(settings)}, nats").in_terminal(width)


def table_note(effects: Effects, sort: str, limit: int | None) -> str:
    """The note under the table."""
    shown = len(effects) if limit is None else min(limit, len(effects))
    return (
        f"{shown:,} of {len(effects):,} measured features by {sort}; "
        f"the dictionary has {effects.dictionary['d_sae']:,}. Means over places; {_errors(effects)}. "
        "direct: Δ loss to first order, bypassing all blocks; random: "
        "KL of a random direction of the same length."
    )


def _errors(effects: Effects) -> str:
    """What follows ±, or why nothing does."""
    return error_note({"documents": max((effect.documents for effect in effects.features.values()), default=2)})


def effect_lines(effect: FeatureEffect, settings: EffectSettings) -> str:
    """A few lines shown with a feature."""
    if not effect.positions:
        return f"{what_is_done(settings)}: it was changed nowhere in the held-out text read"
    direct = "" if effect.direct is None else f" (direct {signed(effect.direct)})"
    random = "" if effect.random_kl.value is None else f" (random direction {effect.random_kl})"
    return (
        f"{what_is_done(settings)} at {effect.positions} places in {effect.documents} documents, nats:\n"
        f"loss {signed(effect.loss)}{direct}, next {settings.window} {signed(effect.loss_after)}\n"
        f"KL {effect.kl}{random}"
    )


def signed(estimate: Estimate) -> str:
    """An estimate of a difference with its sign."""
    plus = estimate.value is not None and estimate.value > 0
    return f"+{estimate}" if plus else str(estimate)


def summary_lines(effects: Effects) -> list[str]:
    """Summary of all features: how well direct and measured effects agree, and how many features exceed the nulls."""
    measured = [effect for effect in effects.features.values() if effect.positions]
    random = [effect.kl_above_random for effect in measured]
    elsewhere = [independent_difference(effect.kl, effect.elsewhere_kl) for effect in measured]
    lines = []
    for differences, null in (
        (random, "a random direction of the same length does at the same places"),
        (elsewhere, "their own directions do where they do not fire"),
    ):
        above = [lower > 0 for lower, _ in filter(None, (difference.interval for difference in differences))]
        if above:
            lines.append(
                f"{sum(above):,} of {len(above):,} features change the next-token distribution more than {null} "
                "(KL, the difference's 95 % interval is above 0)."
            )
    for name, correlation in (("features", effects.over_features), ("places", effects.over_positions)):
        if correlation is not None and correlation.value is not None:
            lines.append(f"Direct against measured change of the loss over {name}: {_correlation(correlation)}.")
    return lines


def markdown(effects: Effects, figure: str | None) -> str:
    """The content of `effects.md`.

    Args:
        effects: effects of all measured features.
        figure: path of the figure relative to the file; None: no figure.
    """
    settings, measured = effects.settings, [effect for effect in effects.features.values() if effect.positions]
    parts = [
        f"# Effects of features at {code(effects.place)}",
        f"Dictionary {code(effects.dictionary['weights_sha256'][:12])} on {code(effects.model.get('name'))}. "
        f"{len(effects):,} features, {what_is_done(settings)} (f becomes {settings.scale:g}·f) at up to "
        f"{settings.positions} places each, one place of one context at a time, found in {effects.tokens:,} held-out "
        f"tokens. Losses and divergences in nats: of the next token at the place, and summed over the following "
        f"{settings.window} positions of its document. {_errors(effects)}."
        + (f" {effects.road[0].upper()}{plain(effects.road[1:])}." if effects.road else ""),
        "## All features",
        Table.of_rows(
            ["mean of a feature", *(f"{share:.0%}" for share in _QUANTILES)], _distributions(measured)
        ).in_markdown(),
        "Quantiles over features. Random direction: same length, same places. Elsewhere: the feature's mean "
        "activation added where it does not fire.",
        *summary_lines(effects),
    ]
    if figure is not None:
        parts.append(f"![measured against direct effect]({figure})")
    parts += ["## By feature", _by_feature(effects)]
    return document(parts)


def _distributions(measured: Sequence[FeatureEffect]) -> list[list[str]]:
    rows = {
        "Δ loss": [effect.loss for effect in measured],
        "Δ loss, random direction": [effect.random_loss for effect in measured],
        "Δ loss, elsewhere": [effect.elsewhere_loss for effect in measured],
        "Δ loss, direct": [effect.direct for effect in measured if effect.direct is not None],
        "Δ loss, following positions": [effect.loss_after for effect in measured],
        "KL": [effect.kl for effect in measured],
        "KL, random direction": [effect.random_kl for effect in measured],
        "KL, elsewhere": [effect.elsewhere_kl for effect in measured],
        "KL, following positions": [effect.kl_after for effect in measured],
    }
    return [[name, *quantiles(estimates)] for name, estimates in rows.items()]


def quantiles(estimates: Iterable[Estimate]) -> list[str]:
    """Quantiles of the known values, with three digits."""
    values = [estimate.value for estimate in estimates if estimate.value is not None]
    if not values:
        return [NONE] * len(_QUANTILES)
    return [f"{value:.3g}" for value in np.quantile(values, _QUANTILES)]


def _by_feature(effects: Effects) -> str:
    rows = []
    for effect in effects.sorted_by("kl")[:_ROWS_IN_MARKDOWN]:
        estimates = (effect.loss, effect.loss_after, effect.kl, effect.random_kl, effect.direct)
        tokens = f"{_tokens(effect.raised)} / {_tokens(effect.lowered)}"
        numbers = [str(effect.feature), f"{effect.density:.2%}", f"{effect.positions} / {effect.documents}"]
        rows.append([*numbers, *map(_cell, estimates), tokens])
    head = ["feature", "density", "places / documents", "Δ loss", "Δ following", "KL", "KL random", "Δ direct"]
    note = (
        ""
        if len(effects) <= _ROWS_IN_MARKDOWN
        else f"\n\nThe {_ROWS_IN_MARKDOWN} features with the largest KL; the JSON has all."
    )
    return Table.of_rows([*head, "more / less likely, direct"], rows).in_markdown() + note


def _tokens(changes: Sequence[TokenChange]) -> str:
    """Token text as code spans, escaped so that no character can end them."""
    return " ".join(code(visible(change.token)) for change in changes) or NONE


def independent_difference(a: Estimate, b: Estimate) -> Estimate:
    """a − b of different places; with a standard error if both have one, with the smaller degrees of freedom."""
    if a.value is None or b.value is None:
        return Estimate(None, None)
    if a.standard_error is None or b.standard_error is None:
        return Estimate(a.value - b.value, None)
    degrees = [number for number in (a.degrees_of_freedom, b.degrees_of_freedom) if number is not None]
    return Estimate(a.value - b.value, math.hypot(a.standard_error, b.standard_error), min(degrees, default=None))


def _correlation(correlation: Correlation) -> str:
    value = f"r = {correlation.value:.3f} over {correlation.count:,}"
    if correlation.low is None:
        return value
    return f"{value}; shuffled features {correlation.low:+.3f} to {correlation.high:+.3f} (middle 95 %)"


def _short(estimate: Estimate | None) -> str:
    """The value alone, with two digits."""
    return NONE if estimate is None or estimate.value is None else f"{estimate.value:.2g}"


def _cell(estimate: Estimate | None) -> str:
    return NONE if estimate is None else str(estimate)
