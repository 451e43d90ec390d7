"""The features found for a concept, as a table, as sentences, and as the content of a page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae.probing.concepts import ConceptSearch, FoundFeature, NullSearch
from sae.probing.contrasts import WITH
from sae.probing.scores import plus_minus
from sae.results.sheet import Scored, Sheet
from sae.results.table import NONE, Table

if TYPE_CHECKING:
    from rich.console import Group

LIKELY = 0.05
"""A feature with a larger p does not stand out from searches under shuffled labels."""
HEAD = ("", "AUC, held out", "AUC, searched", "p", "fires with", "fires without")


def concept_table(result: ConceptSearch, width: int | None = None) -> Group:
    """The features, the best neuron and the nulls, for the terminal.

    Args:
        result: what was found.
        width: width of the terminal in characters; None: wide enough.
    """
    return _table(result).in_terminal(width)


def concept_sheet(result: ConceptSearch) -> Sheet:
    """What a page shows of the result; `sae.viewer.write_sheet` writes it."""
    neuron, null = result.neuron, result.null
    model = result.subject.get("model", {}).get("name")
    return Sheet(
        f"Features for {result.name!r}",
        " · ".join(filter(None, [model, title(result)])),
        tuple(sentences(result)),
        _table(result),
        (
            *(Scored(f"feature {one.index}", one.auc, one.examples) for one in result.features),
            Scored(neuron_name(neuron), neuron.auc),
        ),
        (null.auc - 2 * null.deviation, null.auc + 2 * null.deviation),
    )


def _table(result: ConceptSearch) -> Table:
    return Table.of_rows(HEAD, rows(result), title=title(result), notes=sentences(result))


def title(result: ConceptSearch) -> str:
    """What was searched for, and where."""
    hook = result.subject.get("hook")
    label = "" if result.positive == WITH else f", {result.positive!r} against the rest"
    return f"{result.name!r}{label}{f', at {hook}' if hook else ''}"


def rows(result: ConceptSearch) -> list[list[str]]:
    """A row per feature, then the neuron and the nulls, with the columns of `HEAD`."""
    return [
        *(_row(f"feature {feature.index}", feature, result) for feature in result.features),
        [*_row(neuron_name(result.neuron), result.neuron, result)[:4], NONE, NONE],
        _null_row("features, shuffled", result.null),
        _null_row("neurons, shuffled", result.neuron_null),
    ]


def neuron_name(neuron: FoundFeature) -> str:
    """`neuron 12`, or `neuron −12` if it is lower with the concept."""
    return f"neuron {'−' if neuron.sign < 0 else ''}{neuron.index}"


def sentences(result: ConceptSearch) -> list[str]:
    """What the numbers mean, and whether the best feature stands out."""
    best, null = result.best, result.null
    if best.p <= LIKELY:
        verdict = f"Feature {best.index} stands out: {p_text(best.p, result)} of the searches"
    else:
        verdict = f"No feature stands out: {p_text(best.p, result)} of the searches"
    return [
        f"{verdict} with shuffled labels find a feature whose AUC is as high ({best.search_auc:.3f}); one in twenty "
        f"finds {null.search_high:.3f} or more. On held-out examples its AUC is {best.auc}, that of the best neuron "
        f"{result.neuron.auc}; difference {result.gain}.",
        f"Searched: {result.d_sae:,} features on {_sides(result.examples)} examples of {result.groups[0]:,} texts or "
        f"groups; held out: {_sides(result.held_out)} of {result.groups[1]:,}. ± standard error over groups"
        f"{' (–: unknown, since one side is in a single group)' if best.auc.standard_error is None else ''}. With "
        "shuffled labels: mean of the best of each search, and ± deviation over searches.",
    ]


def p_text(p: float, result: ConceptSearch) -> str:
    """A p value as a share, which cannot be below one in the number of draws."""
    least = 1 / (1 + result.settings.permutations)
    return f"at most {least:.2g}" if p <= least * 1.0001 else f"{p:.2g}"


def _row(name: str, feature: FoundFeature, result: ConceptSearch) -> list[str]:
    return [
        name,
        plus_minus(feature.auc.value, feature.auc.standard_error),
        f"{feature.search_auc:.3f}",
        p_text(feature.p, result).replace("at most ", "≤ "),
        f"{feature.fires_with:.0%}",
        f"{feature.fires_without:.0%}",
    ]


def _null_row(name: str, null: NullSearch) -> list[str]:
    return [name, plus_minus(null.auc, null.deviation), f"{null.search_auc:.3f}", NONE, NONE, NONE]


def _sides(counts: tuple[int, int]) -> str:
    return f"{counts[0]:,} + {counts[1]:,}"
