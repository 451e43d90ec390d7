"""Print the features of a text in the terminal: of each token in a table, and of the whole text."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from sae.console.terminal import output
from sae.features.text import visible
from sae.features.text_features import TextFeature, TextFeatures, TextToken
from sae.results.table import NONE, Column, Table
from sae.viewer.terminal import HOT, PALE, density_text, in_colour, number_text

_MASKED = "masked"
_PEEK = 8
_WHOLE, _BEFORE, _AFTER = 200, 60, 20
"""A text of at most so many tokens is shown whole, of a longer one those around the strongest."""


def print_text_features(result: TextFeatures, console: Console | None = None, *, per_token: int = 3) -> None:
    """Print a text's features: a row for each token with the strongest ones there, then the features of the text.

    Token text is printed literally, never as markup; control characters are replaced by visible signs.

    Args:
        result: the features of the text.
        console: where to print; None for standard output.
        per_token: number of strongest features of a token.
    """
    console = console or output()
    console.print(_tokens(result, per_token).in_terminal(console.width))
    console.print("", _features(result).in_terminal(console.width), sep="\n")
    for feature in result.features:
        if feature.max > 0:
            console.print("", _line(result, feature, in_colour(console)), sep="\n")


def _tokens(result: TextFeatures, per_token: int) -> Table:
    columns = (
        Column("position", [str(place) for place in range(len(result.tokens))]),
        Column("token", [visible(token.text) for token in result.tokens], is_text=True),
        Column("fire", ["" if token.masked else str(len(token.firing)) for token in result.tokens]),
        Column("strongest", [_strongest(token, per_token) for token in result.tokens], is_text=True),
    )
    masked = sum(token.masked for token in result.tokens)
    notes = [f"strongest: feature, and its activation at {result.hook}"]
    if masked:
        notes.append(f"{_MASKED}: {masked} of {len(result.tokens)} tokens, left out of training as such tokens were")
    return Table(columns, title="Tokens", notes=notes)


def _strongest(token: TextToken, most: int) -> str:
    if token.masked:
        return _MASKED
    return "  ".join(f"{feature} {number_text(value)}" for feature, value in token.firing[:most]) or NONE


def _features(result: TextFeatures) -> Table:
    features = result.features
    columns = [
        Column("feature", [str(one.feature) for one in features]),
        Column("max", [number_text(one.max) if one.max > 0 else NONE for one in features]),
        Column("at", [NONE if one.position is None else str(one.position) for one in features]),
        Column("tokens", [str(one.count) for one in features]),
    ]
    known = [one.known for one in features if one.known is not None]
    if known:
        columns += [
            Column("usual", [number_text(one.mean) if one.max > 0 else NONE for one in known]),
            Column("density", ["dead" if one.density == 0 else density_text(one.density) for one in known]),
            Column(
                "fires on",
                [" ".join(f"«{visible(token)}»" for token in one.tokens[:_PEEK]) for one in known],
                is_text=True,
                is_cut=True,
            ),
        ]
    notes = [
        f"{result.fired:,} of {result.d_sae:,} features fire; max: the largest activation in the text; at: its "
        "position; tokens: those on which it fires"
        + ("; usual: the mean of its non-zero activations in the feature store" if known else "")
    ]
    return Table(columns, title="Features", notes=notes)


def _line(result: TextFeatures, feature: TextFeature, colour: bool) -> Text:
    """The text with a feature's activations in colours or signs; of a long one, what is around the strongest."""
    line, peak = Text.assemble((f"{feature.feature}: ", "bold")), feature.position or 0
    first = max(0, peak - _BEFORE) if len(result.tokens) > _WHOLE else 0
    last = peak + _AFTER if len(result.tokens) > _WHOLE else len(result.tokens)
    pairs = list(enumerate(zip(result.tokens, feature.activations, strict=True)))[first:last]
    for place, (token, activation) in pairs:
        shown, is_peak = visible(token.text), place == feature.position
        if token.masked or (not token.text and activation <= 0):
            continue
        if activation <= 0:
            line.append(shown)
        elif colour:
            share = activation / feature.max
            red, green, blue = (round(low + share * (high - low)) for low, high in zip(PALE, HOT, strict=True))
            line.append(shown, f"{'bold underline ' if is_peak else ''}white on rgb({red},{green},{blue})")
        else:
            line.append(f"«{shown}»" if is_peak else f"‹{shown}›")
    return line
