"""What saved dictionaries are, as a table: settings, sizes, hook points, language model, training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from sae.dictionary.base import Dictionary, dtype_name
from sae.dictionary.origin import dead_in_training
from sae.dictionary.sites import Sites
from sae.formats import outline
from sae.formats.foreign import other_format
from sae.results.table import NONE, Column, Table

if TYPE_CHECKING:
    from rich.console import Group

_LINE = 30
"""Longest line of a cell, in characters: two dictionaries fit side by side in 80."""
_DEAD = (
    f"dead features had not fired for train.dead_after_tokens when training ended; {NONE}: not recorded, or training "
    "was shorter than that"
)


def information_table(places: Sequence[str | Path], width: int | None = None) -> Group:
    """A column for each dictionary, from its files alone: neither weights nor a language model are loaded.

    Args:
        places: dictionaries' folders, run folders that hold one, or names of the hub.
        width: of the terminal, in characters; None: wide enough.

    Raises:
        FormatError: as `sae.load`: a folder holds no dictionary, or one that cannot be read.
    """
    named = [(str(place), facts_of(outline(place))) for place in places]
    facts = Column("", list(named[0][1]), is_text=True)
    columns = [Column(_folded(name), [_folded(fact) or NONE for fact in cells.values()]) for name, cells in named]
    return Table([facts, *columns], notes=[_DEAD]).in_terminal(width)


def facts_of(dictionary: Dictionary) -> dict[str, str]:
    """What a dictionary is; empty if it is not recorded."""
    metadata, origin = dictionary.metadata, dictionary.origin
    settings = [f"{key}={value}" for key, value in {**dictionary.settings(), **dictionary.frame.to_json()}.items()]
    widths = [dictionary.d_in, dictionary.d_sae, *([dictionary.d_out] if dictionary.is_transcoder else [])]
    return {
        "architecture": ", ".join([dictionary.architecture, *settings]),
        "widths": " → ".join(f"{width:,}" for width in widths),
        "number type": dtype_name(dictionary.dtype),
        "reads": _hooks(origin.reads),
        "gives": _hooks(origin.gives),
        "language model": _of_models(origin.models, "name"),
        "weight processing": _of_models(origin.models, "weight_processing"),
        "training tokens": _number(metadata.get("trained", {}).get("tokens")),
        "dead features": _number((dead_in_training(metadata) or {}).get("features")),
        "sae version": _text(metadata.get("sae_version")),
        "converted from": _text(other_format(dictionary)),
    }


def _hooks(sites: Sites) -> str:
    return _lines((site.model, site.hook or "") for site in sites)


def _of_models(models: Mapping[str, Mapping[str, Any]], key: str) -> str:
    return _lines((model, _text(facts.get(key))) for model, facts in models.items())


def _lines(facts: Iterable[tuple[str, str]]) -> str:
    """Facts on a line each, after the model that they are of if there are several."""
    return "\n".join(f"{model}: {fact}" if model else fact for model, fact in facts if fact)


def _text(fact: object) -> str:
    return fact if isinstance(fact, str) else ""


def _number(fact: object) -> str:
    return f"{fact:,}" if isinstance(fact, int) else ""


def _folded(text: str) -> str:
    """Text in lines that are short enough for a cell."""
    return "\n".join(part for line in text.split("\n") for part in wrap(line, _LINE, break_on_hyphens=False))
