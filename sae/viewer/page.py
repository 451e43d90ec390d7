"""Write features as one self-contained static page: no network, no server, no other files."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from sae.effects.effects import Effects, FeatureEffect
from sae.effects.view import signed, what_is_done
from sae.features.feature import Example, Feature, TokenLogit
from sae.features.store import Features
from sae.files.printable import json_text, printable
from sae.files.writing import write_bytes
from sae.results.table import NONE

_LENGTHS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_LONG = "-"
_PEEK = 6


def write_page(
    features: Features, indices: Iterable[int], path: str | Path, title: str, effects: Effects | None = None
) -> None:
    """Write the features `indices` as one HTML file, including those of their effects that `effects` has.

    Token text is data in the page: it is in a JSON block that it cannot end early, and the script shows it only as
    text. The page's policy forbids loading anything and running any script but its own.

    Raises:
        UnknownFeatureError: an index is not in the store.
        CacheError: the file cannot be written.
    """
    style, script = asset("page.css"), asset("page.js")
    data = embeddable_json(page_data(features, indices, title, effects))
    page = head(title, style, script) + filled(asset("page.html"), title=escaped(title), data=data, script=script)
    write_bytes(Path(path), page.encode(), hashed=False)  # the path can be anywhere


def head(title: str, style: str, script: str | None = None) -> str:
    """The beginning of a page, up to its body. Its policy allows this style and this script, and nothing else."""
    runs = "" if script is None else f"script-src {hash_source(script)}; "
    policy = f"default-src 'none'; style-src {hash_source(style)}; {runs}base-uri 'none'; form-action 'none'"
    return filled(asset("head.html"), title=escaped(title), policy=policy, style=style)


def filled(template: str, **parts: str) -> str:
    """A template with a text in place of each `{{name}}`; names in these texts are left alone."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def escaped(text: str) -> str:
    """Text as it is written between elements."""
    return html.escape(printable(text))


def page_data(features: Features, indices: Iterable[int], title: str, effects: Effects | None = None) -> dict[str, Any]:
    """The data read by the page's script; names are short, since there may be thousands of features."""
    documents: dict[str, int] = {}
    entries = [
        _feature(features[index], documents, effects, features.labels.get(index)) for index in dict.fromkeys(indices)
    ]
    return {
        "title": title,
        "hook": features.info["hook"],
        "model": features.info.get("model"),
        "tokens": features.info["tokens"],
        "d_sae": len(features),
        "lengths": _LENGTHS,
        "edges": features.info["histogram_edges"],
        "documents": list(documents),
        "changed": what_is_done(effects.settings) if effects is not None else None,
        "features": entries,
    }


def embeddable_json(content: Any) -> str:
    """Compact JSON that is safe inside a script element: it cannot end the element or open another."""
    escapes = {character: f"\\u{ord(character):04x}" for character in "<>&"}
    return json_text(content, separators=(",", ":"), allow_nan=False).translate(str.maketrans(escapes))


def token_lengths(tokens: list[str]) -> str:
    """Lengths of the tokens in UTF-16 units, one letter each; each preceding `-` adds 61."""
    parts = (divmod(len(token.encode("utf-16-le", "surrogatepass")) // 2, len(_LENGTHS) - 1) for token in tokens)
    return "".join(_LONG * longs + _LENGTHS[rest] for longs, rest in parts)


def _feature(feature: Feature, documents: dict[str, int], effects: Effects | None, label: str | None) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "i": feature.index,
        "n": [[near.feature, _short(near.cosine), int(near.dead)] for near in feature.neighbours],
    }
    if feature.promoted is not None and feature.suppressed is not None:
        entry |= {"u": _logits(feature.promoted), "l": _logits(feature.suppressed)}
    if not feature.dead:
        entry |= {
            "d": _short(feature.density),
            "c": feature.count,
            "x": _short(feature.max, 5),
            "m": _short(feature.mean, 5),
            "p": feature.peek[:_PEEK],
            "h": [feature.histogram.edges, feature.histogram.counts],
            "t": [_example(example, documents) for example in feature.top],
            "q": [[_example(example, documents) for example in group] for group in feature.quantiles],
        }
    if label is not None:
        entry["w"] = label
    if effects is not None and feature.index in effects.features:
        entry["e"] = _effect(effects[feature.index], effects.settings.window)
    return entry


def _effect(effect: FeatureEffect, window: int) -> list[list[str]]:
    """Labels and texts of a feature's effects."""
    rows = [
        ["Δ loss there", signed(effect.loss)],
        [f"Δ loss, next {window}", signed(effect.loss_after)],
        ["KL there", str(effect.kl)],
        ["KL, random direction", str(effect.random_kl)],
        ["Δ loss, direct", NONE if effect.direct is None else signed(effect.direct)],
        ["measured at", f"{effect.positions:,} places, {effect.documents:,} documents"],
    ]
    return rows if effect.positions else rows[-1:]


def _example(example: Example, documents: dict[str, int]) -> list[Any]:
    """Activation, document, row, position, text, token lengths, and alternating positions and non-zero activations."""
    firing = [(place, value) for place, value in enumerate(example.activations) if value > 0]
    return [
        _short(example.value, 4),
        documents.setdefault(example.document, len(documents)),
        example.row,
        example.position,
        "".join(example.tokens),
        token_lengths(example.tokens),
        [number for place, value in firing for number in (place, _short(value))],
    ]


def _logits(entries: list[TokenLogit]) -> list[Any]:
    return [part for entry in entries for part in (entry.token, _short(entry.logit))]


def _short(number: float, digits: int = 3) -> float | int:
    short = float(f"{number:.{digits}g}")
    return int(short) if short.is_integer() else short


def asset(name: str) -> str:
    """A file next to this module."""
    return resources.files("sae.viewer").joinpath(name).read_text(encoding="utf-8")


def hash_source(content: str) -> str:
    """What a page's policy allows: the script or style with this content, and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
