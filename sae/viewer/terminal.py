"""Print features in the terminal: one in full, or many in a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Column as GridColumn
from rich.table import Table as Grid
from rich.text import Text

from sae.console.terminal import output
from sae.effects.effects import Effects
from sae.effects.view import effect_lines
from sae.features.feature import Example, Feature, TokenLogit
from sae.features.search import Hit
from sae.features.store import Features
from sae.features.text import visible
from sae.results.table import Column, Table

HOT = (214, 102, 16)
PALE = (72, 48, 32)


def print_feature(
    feature: Feature, console: Console | None = None, effects: Effects | None = None, label: str | None = None
) -> None:
    """Print a feature: its numbers, logits and neighbours, then its strongest contexts and those of each quantile.

    If its effect is in `effects`, it is shown with the numbers. Token text is printed literally, never as markup;
    control characters are replaced by visible signs. Without colours, the strongest token is in «» and others that fire
    in ‹›.
    """
    console = console or output()
    colour = in_colour(console)
    console.print(_header(feature))
    if label is not None:
        console.print(_labelled("label", Text(visible(label))))
    if effects is not None and feature.index in effects.features:
        console.print(_labelled("effect", Text(effect_lines(effects[feature.index], effects.settings))))
    if feature.promoted is not None and feature.suppressed is not None:
        console.print(_labelled("raises", _logits(feature.promoted)))
        console.print(_labelled("lowers", _logits(feature.suppressed)))
    if feature.neighbours:
        console.print(_labelled("near", _neighbours(feature)))
    if feature.dead:
        console.print(Text("\nIt never fired in the tokens scanned, so there are no examples.", style="dim"))
        return
    console.print(_contexts("Strongest, one per document", feature.top, feature.max, colour))
    for number, examples in enumerate(feature.quantiles):
        if examples:
            console.print(_contexts(quantile_title(number, len(feature.quantiles)), examples, feature.max, colour))


def print_features(
    features: Features,
    console: Console | None = None,
    sort: str = "density",
    limit: int | None = 50,
    max_density: float = 1.0,
) -> None:
    """Print a table of the first `limit` features sorted by `sort`, dead ones last.

    Features that fire on a larger share of tokens than `max_density` are left out.

    Raises:
        ConfigError: `sort` is not a column to sort by.
    """
    console = console or output()
    order = features.sorted_by(sort, max_density=max_density)
    chosen, labels = [features[index] for index in order[:limit]], features.labels
    columns = [
        Column("feature", [str(feature.index) for feature in chosen]),
        Column("density", ["dead" if feature.dead else density_text(feature.density) for feature in chosen]),
        Column("max", ["" if feature.dead else number_text(feature.max) for feature in chosen]),
        Column("mean", ["" if feature.dead else number_text(feature.mean) for feature in chosen]),
        Column("fires on", [_peek(feature, in_colour(console)) for feature in chosen], is_text=True, is_cut=True),
    ]
    if any(feature.index in labels for feature in chosen):
        cells = [Text(visible(labels.get(feature.index, ""))) if feature.index in labels else "" for feature in chosen]
        columns.insert(1, Column("label", cells, is_text=True))
    console.print(Table(columns).in_terminal(console.width))
    dead = int(features.summary().dead.sum())
    rarer = f", {len(order):,} of them on at most {density_text(max_density)} of tokens" if max_density < 1 else ""
    shown = f"{len(chosen):,} of {len(features):,} features by {sort}{rarer}"
    console.print(Text(f"{shown}; {dead:,} dead in {features.info['tokens']:,} tokens", "dim"))


def print_hits(features: Features, hits: Sequence[Hit], console: Console | None = None, limit: int | None = 50) -> None:
    """Print a table of the first `limit` features that a search found, each with the reasons why."""
    console = console or output()
    shown, density = hits[:limit], features.summary().density.tolist()
    columns = (
        Column("feature", [str(hit.feature) for hit in shown]),
        Column("density", ["dead" if hit.dead else density_text(density[hit.feature]) for hit in shown]),
        Column("why", [Text(hit.why) for hit in shown], is_text=True),
    )
    console.print(Table(columns).in_terminal(console.width))
    console.print(Text(f"{len(shown):,} of {len(hits):,} features found, of {len(features):,}", "dim"))


def in_colour(console: Console) -> bool:
    """Whether background colours are visible. In a pipe or a file they are not, and signs are used instead."""
    return console.is_terminal and not console.no_color and console.color_system is not None


def _peek(feature: Feature, colour: bool) -> Text:
    tokens = [] if feature.dead else [visible(token) for token in feature.peek[:8]]
    return Text(" ").join(Text(token, style="on grey23") if colour else Text(f"«{token}»") for token in tokens)


def quantile_title(number: int, quantiles: int) -> str:
    """Heading for a quantile of the non-zero activations; number 0 is the strongest."""
    high, low = 100 * (quantiles - number) / quantiles, 100 * (quantiles - number - 1) / quantiles
    return f"Random from the {low:.3g}–{high:.3g} % quantile of non-zero activations"


def density_text(density: float) -> str:
    """A density as a percentage with two digits."""
    return f"{100 * density:.2g} %" if density < 0.1 else f"{100 * density:.0f} %"


def number_text(number: float) -> str:
    """A number with three digits, including trailing zeros."""
    return f"{number:#.3g}".rstrip(".") if 1e-3 <= number < 1000 else f"{number:.3g}"


def _header(feature: Feature) -> Text:
    text = Text(f"Feature {feature.index}", style="bold")
    if feature.dead:
        return text.append("  dead", style="bold red")
    rarity = f"1 in {1 / feature.density:,.0f} tokens" if feature.density < 0.5 else "most tokens"
    sizes = f"max {number_text(feature.max)}   mean {number_text(feature.mean)}   firings {feature.count:,}"
    return text.append(f"  density {density_text(feature.density)} ({rarity})   {sizes}", style="not bold")


def _labelled(label: str, content: Text) -> Padding:
    line = Grid.grid(GridColumn(width=7, style="dim"), GridColumn(), padding=(0, 1))
    line.add_row(label, content)
    return Padding(line, (0, 0, 0, 2))


def _logits(entries: list[TokenLogit]) -> Text:
    return Text("  ").join(
        Text.assemble((visible(entry.token), "on grey23"), (f" {entry.logit:+.2f}", "dim")) for entry in entries
    )


def _neighbours(feature: Feature) -> Text:
    return Text("  ").join(
        Text.assemble(str(near.feature), (f" {near.cosine:.2f}{' dead' if near.dead else ''}", "dim"))
        for near in feature.neighbours
    )


def _contexts(title: str, examples: list[Example], largest: float, colour: bool) -> Group:
    values, contexts = GridColumn(justify="right", style="bold", no_wrap=True), GridColumn(overflow="fold")
    table = Grid.grid(values, contexts, padding=(0, 1))
    for example in examples:
        table.add_row(number_text(example.value), _context(example, largest, colour))
    return Group(Text(f"\n{title}", style="underline"), table)


def _context(example: Example, largest: float, colour: bool) -> Text:
    """The context, with colours; without them, the strongest token in «» and others that fire in ‹›."""
    text = Text()
    for position, (token, activation) in enumerate(zip(example.tokens, example.activations, strict=True)):
        is_peak = position == example.position
        if activation <= 0:
            text.append(visible(token) if token else "")
        elif colour:
            text.append(visible(token), style=_heat(min(1.0, activation / largest), is_peak))
        else:
            text.append(f"«{visible(token)}»" if is_peak else f"‹{visible(token)}›")
    return text


def _heat(share: float, is_peak: bool) -> str:
    red, green, blue = (round(low + share * (high - low)) for low, high in zip(PALE, HOT, strict=True))
    return f"{'bold underline ' if is_peak else ''}white on rgb({red},{green},{blue})"
