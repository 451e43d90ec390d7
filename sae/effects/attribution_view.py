"""Attributions as text for readers: a terminal table with what each feature fires on, and how they add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sae.effects.attribution import GRADIENT_ACTIVATION, Attribution
from sae.features.store import Features
from sae.features.text import visible
from sae.results.table import NONE, Column, Table

if TYPE_CHECKING:
    from rich.text import Text

_TOKENS = 6
_ERROR = "error"
_NO_STORES: Mapping[str, Features] = {}


def attribution_table(
    attribution: Attribution, n: int = 20, stores: Mapping[str, Features] = _NO_STORES, *, colour: bool = False
) -> Table:
    """The entries with the largest attributions.

    Args:
        attribution: attributions to one or several dictionaries.
        n: maximum number of rows.
        stores: feature stores by hook point, for what features fire on.
        colour: set tokens apart by their background instead of by «».
    """
    entries = attribution.top(n)
    columns = [
        Column("position", [str(entry.position) for entry in entries]),
        Column("token", [_token(entry.token, colour) for entry in entries], is_text=True, is_cut=True),
        Column("feature", [_feature(entry.feature) for entry in entries]),
        Column("activation", [f"{entry.activation:.3g}" for entry in entries], is_extra=True),
        Column("attribution", [_signed(entry.attribution) for entry in entries]),
        *_descriptions([(entry.hook, entry.feature) for entry in entries], stores, colour),
    ]
    if len(attribution.tokens) > 1:
        columns.insert(0, Column("context", [str(entry.context) for entry in entries]))
    return Table([*_hooks(attribution, [entry.hook for entry in entries]), *columns], _title(attribution))


def totals_table(
    attribution: Attribution, n: int = 20, stores: Mapping[str, Features] = _NO_STORES, *, colour: bool = False
) -> Table:
    """The features with the largest sums over positions; the arguments are those of `attribution_table`."""
    totals = attribution.by_feature(n)
    columns = [
        Column("feature", [_feature(total.feature) for total in totals]),
        Column("positions", [str(total.positions) for total in totals]),
        Column("attribution", [_signed(total.attribution) for total in totals]),
        *_descriptions([(total.hook, total.feature) for total in totals], stores, colour),
    ]
    return Table([*_hooks(attribution, [total.hook for total in totals]), *columns], _title(attribution))


def completeness_lines(attribution: Attribution) -> list[str]:
    """For each dictionary: the sum of all attributions beside the change of the function, and the gap."""
    method = "gradient × activation" if attribution.method == GRADIENT_ACTIVATION else (
        f"integrated gradients, {attribution.steps} steps"
        + (f" in {attribution.groups} groups" if attribution.groups > 1 else "")
    )  # fmt: skip
    zero = "features and errors" if attribution.error_term else "features"
    lines = []
    for dictionary in attribution.dictionaries:
        share = "" if dictionary.relative_gap is None else f" ({dictionary.relative_gap:.2%} of it)"
        lines.append(
            f"{dictionary.gives}, {method}: all attributions add up to {_signed(sum(dictionary.total))}; with all "
            f"{zero} at 0 the value is {_plain(sum(dictionary.baseline))}, from which it rises by "
            f"{_signed(sum(dictionary.change))}; completeness gap {_signed(dictionary.gap)}{share}."
        )
    return lines


def _title(attribution: Attribution) -> str:
    values = ", ".join(map(_plain, attribution.value))
    return f"{attribution.of}: {values}"


def _hooks(attribution: Attribution, hooks: Sequence[str]) -> list[Column]:
    """A column of hook points, if there are several."""
    several = len(attribution.dictionaries) > 1
    return [Column("hook point", hooks, is_text=True)] if several else []


def _descriptions(
    features: Sequence[tuple[str, int | None]], stores: Mapping[str, Features], colour: bool
) -> list[Column]:
    """A column of the tokens that features fire on, if there is a store."""
    if not stores:
        return []
    from rich.text import Text

    cells = []
    for hook, feature in features:
        found = stores[hook][feature] if feature is not None and hook in stores else None
        tokens = [] if found is None or found.dead else found.peek[:_TOKENS]
        cells.append(Text(" ").join(_token(token, colour) for token in tokens) if tokens else Text(NONE))
    return [Column("fires on", cells, is_text=True, is_cut=True)]


def _token(token: str, colour: bool) -> Text:
    from rich.text import Text

    return Text(visible(token), style="on grey23") if colour else Text(f"«{visible(token)}»")


def _feature(feature: int | None) -> str:
    return _ERROR if feature is None else str(feature)


def _signed(number: float) -> str:
    return f"{number:+.3g}"


def _plain(number: float) -> str:
    return f"{number:.4g}"
