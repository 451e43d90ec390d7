"""Write the features of texts as one self-contained static page, on which a chosen feature colours the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae.features.text_features import TextFeature, TextFeatures
from sae.files.writing import write_bytes
from sae.viewer.page import asset, embeddable_json, escaped, filled, head

_PEEK = 6


def write_text_page(results: Sequence[TextFeatures], path: str | Path, title: str, *, per_token: int = 10) -> None:
    """Write the features of one or several texts as one HTML file.

    Token text is data in the page, as in `write_page`; the page's policy forbids loading anything and running any
    script but its own.

    Args:
        results: the features of each text.
        path: the file.
        title: the page's title.
        per_token: number of strongest features of a token.

    Raises:
        CacheError: the file cannot be written.
    """
    style, script = asset("page.css") + asset("text_page.css"), asset("text_page.js")
    data = embeddable_json(text_page_data(results, per_token))
    body = filled(asset("text_page.html"), title=escaped(title), data=data, script=script)
    page = head(title, style, script) + body
    write_bytes(Path(path), page.encode(), hashed=False)  # the path can be anywhere


def text_page_data(results: Sequence[TextFeatures], per_token: int) -> dict[str, Any]:
    """The data read by the page's script; names are short."""
    return {
        "hook": results[0].hook,
        "d_sae": results[0].d_sae,
        "texts": [_text(result, per_token) for result in results],
    }


def _text(result: TextFeatures, per_token: int) -> dict[str, Any]:
    return {
        "tokens": [token.text for token in result.tokens],
        "masked": [place for place, token in enumerate(result.tokens) if token.masked],
        "fire": [len(token.firing) for token in result.tokens],
        "firing": [
            [[feature, _short(value)] for feature, value in token.firing[:per_token]] for token in result.tokens
        ],
        "features": [_feature(feature) for feature in result.features],
    }


def _feature(feature: TextFeature) -> dict[str, Any]:
    pairs = [[place, _short(value)] for place, value in enumerate(feature.activations) if value > 0]
    entry: dict[str, Any] = {"i": feature.feature, "x": _short(feature.max), "a": pairs}
    if feature.known is not None:
        known = feature.known
        entry |= {"d": _short(known.density), "m": _short(known.mean), "p": list(known.tokens[:_PEEK])}
    return entry


def _short(activation: float) -> float:
    return float(f"{activation:.3g}")
