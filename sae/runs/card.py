"""The page of a dictionary on the hub, `README.md`: what it is, how it does, some features, how to load it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from sae.dictionary.base import Dictionary
from sae.evaluation.report import place_of
from sae.evaluation.report_view import metrics_markdown
from sae.features import Features
from sae.features.feature import Feature
from sae.hub import HubName
from sae.results.estimate import error_note
from sae.results.markdown import code, document, pipe_table, plain
from sae.runs.information import facts_of

MARK = "<!-- written by sae push -->"
"""In pages that may be written again; others are left alone."""
_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+|(distil)?gpt2|gpt2-(medium|large|xl)")
"""Names of models and data sets of the hub; a name without an organisation is mostly that of a folder."""
_FEATURES, _EXAMPLES, _RARE = 10, 3, 0.01
_BEFORE, _AFTER = 8, 3


@dataclass(frozen=True)
class Content:
    """What a page is made of.

    Attributes:
        dictionary: the dictionary.
        name: where it is uploaded to.
        report: the content of its `eval.json`; None: it has not been evaluated.
        features: its feature store; None: there is none.
        figure: name of an image next to the page; None: there is none.
        licence: name of the licence; None: none is stated.
        for_saelens: whether SAELens's files are there too.
        lost: what those cannot hold.
    """

    dictionary: Dictionary
    name: HubName
    report: Mapping[str, Any] | None
    features: Features | None
    figure: str | None
    licence: str | None
    for_saelens: bool
    lost: Sequence[str]


def card(content: Content, folder: str = "") -> str:
    """The page, with the header in YAML that the hub reads.

    Args:
        content: what it shows.
        folder: path from the page to the dictionary's files, for links; empty: they are next to it.
    """
    name = content.name
    kind = "Transcoder" if content.dictionary.is_transcoder else "Sparse autoencoder"
    title = f"# {kind}: {code(name.path or name.repository)}"
    facts = [[label, code(fact.replace("\n", ", "))] for label, fact in facts_of(content.dictionary).items() if fact]
    return document([header(content), MARK, title, pipe_table(["", ""], facts), *_loading(content),
                     *_measured(content, folder), *_features(content), *_licence(content)])  # fmt: skip


def index(name: HubName, places: Sequence[str], content: Content) -> str:
    """The page of a repository with several dictionaries."""
    rows = [[f"[{plain(place or name.repository)}]({place or '.'})", code(name.at(place))] for place in places]
    listed = pipe_table(["dictionary", "name"], rows)
    loads = f'```python\nimport sae\n\ndictionary = sae.load("{name.at(places[0])}")\n```'
    return document([header(content), MARK, f"# {plain(name.repository)}", listed, loads])


def header(content: Content) -> str:
    """The header in YAML."""
    origin = content.dictionary.origin
    model, data = origin.models.get("", {}).get("name"), (origin.data or {}).get("source")
    sources = [data] if isinstance(data, str) else list(data or ())
    fields: dict[str, Any] = {
        "library_name": "sae",
        "license": content.licence,
        "tags": ["sparse-autoencoder", "mechanistic-interpretability", *(["saelens"] if content.for_saelens else [])],
        "base_model": model if isinstance(model, str) and _ON_HUB.fullmatch(model) else None,
        "datasets": [source for source in sources if "/" in str(source) and _ON_HUB.fullmatch(str(source))] or None,
    }
    stated = {key: value for key, value in fields.items() if value is not None}
    return f"---\n{yaml.safe_dump(stated, sort_keys=False)}---"


def _loading(content: Content) -> Iterator[str]:
    name = content.name
    yield "## Use"
    yield f'```python\nimport sae\n\ndictionary = sae.load("{name}")\n```'
    if content.for_saelens:
        lost = f" (without {'; '.join(map(plain, content.lost))})" if content.lost else ""
        yield f"In SAELens, from `cfg.json` and `sae_weights.safetensors`, which hold the same weights{lost}:"
        call = f'SAE.from_pretrained("{name.repository}", "{name.path}")'
        yield f"```python\nfrom sae_lens import SAE\n\nsae = {call}\n```"


def _measured(content: Content, folder: str) -> Iterator[str]:
    report = content.report
    if report is None:
        return
    evaluated = report["evaluated"]
    yield "## Evaluation"
    yield (
        f"On {evaluated['tokens']:,} held-out tokens of {evaluated['documents']:,} documents, at "
        f"{code(place_of(report))} of {code(report['model'].get('name', 'unknown model'))}."
    )
    yield metrics_markdown(report)
    yield f"Values are means over tokens, {error_note(evaluated)}."
    if content.figure is not None:
        place = "/".join(part for part in (folder, content.figure) if part)
        yield f"![How often features fire]({place})"


def _features(content: Content) -> Iterator[str]:
    if content.features is None:
        return
    chosen = _chosen(content.features)
    if not chosen:
        return
    yield "## Features"
    yield (
        f"{len(chosen)} of {len(content.features):,}, evenly spaced by density among those that fire on at most "
        f"{_RARE:.0%} of the tokens: not chosen for what they show. The token that fires is in bold."
    )
    rows = [[str(feature.index), f"{feature.density:.3%}", f"{feature.max:.3g}", _shown(feature)] for feature in chosen]
    yield pipe_table(["feature", "density", "max", "strongest examples"], rows, text_columns=4)


def _chosen(features: Features) -> list[Feature]:
    """Features evenly spaced by density."""
    dead = features.summary().dead
    alive = [number for number in features.sorted_by("density", max_density=_RARE) if not bool(dead[number])]
    count = min(_FEATURES, len(alive))
    return [features[alive[(2 * number + 1) * len(alive) // (2 * count)]] for number in range(count)]


def _shown(feature: Feature) -> str:
    """The strongest examples, each on a line of its own."""
    lines = []
    for example in feature.top[:_EXAMPLES]:
        at = example.position
        before, token, after = (
            plain("".join(tokens).replace("\n", "⏎"))
            for tokens in (
                example.tokens[max(0, at - _BEFORE) : at],
                example.tokens[at : at + 1],
                example.tokens[at + 1 : at + 1 + _AFTER],
            )
        )
        lines.append(f"{before}<b>{token if token.strip() else '␣'}</b>{after}".strip())
    return "<br>".join(lines)


def _licence(content: Content) -> Iterator[str]:
    if content.licence is not None:
        yield "## Licence"
        yield f"{plain(content.licence)}. The language model and the text of the training have licences of their own."
