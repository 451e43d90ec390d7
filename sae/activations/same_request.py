"""Checks that a cache is the one a configuration asks for, by settings, sources and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae.activations.manifest import PLAIN_COLUMNS, Manifest
from sae.activations.space import stored_tokens
from sae.config.settings import RunConfig
from sae.config.sources import DataConfig
from sae.config.splits import HELD_OUT, TRAIN
from sae.dictionary.model_identity import has_fingerprint, model_label
from sae.errors import CacheError, DataError
from sae.files.paths import expanded
from sae.text.corpus import STANDARD_LIBRARY
from sae.text.fingerprint import source_fingerprint
from sae.text.packing import READING

TOKEN_COLUMNS = "token_columns"
"""Key in a manifest's data: columns of token shards; missing if they are tokens and documents."""
TEXT_READING = "reading"
"""Key in a manifest's data: version of the text reader; if missing 1, or 0 without `TOKEN_COLUMNS`."""
TEXT_STREAMS = "streams"
"""Key in a manifest's data: version of the random streams that shuffled its documents; 1 if missing."""


def check_same_request(folder: Path, manifest: Manifest, config: RunConfig, *, text: bool = False) -> None:
    """Raise CacheError if the cache was made with settings other than `config`'s or, with `text`, from other text."""
    _check_sources(folder, manifest, config.data, text=text)
    data, harvest, model = config.data, config.harvest, manifest.model
    settings = {
        "model.revision": (model.get("requested_revision"), config.model.revision),
        "model.weight_processing": (model.get("weight_processing"), config.model.weight_processing),
        "model.dtype": (model.get("dtype"), config.model.dtype),
        "data.revision": (manifest.data.get("revision"), data.revision),
        **{
            f"data.{key}": (manifest.data.get(key), value)
            for key, value in data_identity(data).items()
            if key != "source"
        },
        "data.tokens": (manifest.rows.get(TRAIN), data.tokens),
        "data.held_out_tokens": (manifest.rows.get(HELD_OUT), data.held_out_tokens),
        "data.context_length": (manifest.context_length, data.context_length),
        "data.prepend_bos": (manifest.tokens.get("prepend_bos"), data.prepend_bos),
        "harvest.hooks": (list(manifest.hooks), list(harvest.hooks)),
        "harvest.dtype": (manifest.dtype, harvest.dtype),
        "harvest.live": (manifest.stored is not None, harvest.live),
        "harvest.shard_contexts": (manifest.shard_contexts, harvest.shard_contexts),
        "harvest.sample_tokens": (manifest.stored_rows(TRAIN), stored_tokens(config, TRAIN)),
        "harvest.masked_positions": (manifest.tokens.get("masked_positions"), harvest.masked_positions),
        "harvest.mask_special_tokens": (manifest.tokens.get("mask_special_tokens"), harvest.mask_special_tokens),
        "data.chat_roles": (
            manifest.tokens.get("chat_roles"),
            None if data.chat_roles is None else list(data.chat_roles),
        ),
    }
    same_files = has_fingerprint(config.model.name, model.get("fingerprint"))
    if same_files is None:
        settings["model.name"] = model.get("name"), model_label(config.model.name)
    elif not same_files:
        raise CacheError(
            f"cache {str(folder)!r}: of another model: the weights of {config.model.name!r} are not those it was made "
            f"with ({model.get('name')!r}); use that model, or set harvest.cache to another folder"
        )
    elif config.model.revision is None:
        del settings["model.revision"]  # older versions recorded it for a folder, where it had no effect
    for key, (recorded, requested) in settings.items():
        if recorded != requested:
            raise CacheError(
                f"cache {str(folder)!r}: made with {key}={recorded!r}, now {requested!r} is asked for; "
                "set harvest.cache to another folder, or delete this one"
            )


def where_from(data: DataConfig) -> dict[str, Any]:
    """Sources by content, not by path: the name of a folder or file, and a hash of its texts."""
    prints = [_fingerprint(source, READING) for source in data.sources]
    names = [
        source if fingerprint is None else label
        for source, label, fingerprint in zip(data.sources, data.labels, prints, strict=True)
    ]
    return {
        "source": names[0] if isinstance(data.source, str) else names,
        **({"fingerprints": prints} if any(prints) else {}),
    }


def _fingerprint(source: str, reading: int) -> str | None:
    """Fingerprint of a source; None if it is not (or no longer) a folder or file of texts."""
    if source == STANDARD_LIBRARY:
        return None
    try:
        return source_fingerprint(source, reading=reading)
    except (DataError, OSError):
        return None


def _check_sources(folder: Path, manifest: Manifest, data: DataConfig, *, text: bool) -> None:
    """Raise CacheError if the cache's text is from another source or, with `text`, has changed since."""
    source = manifest.data.get("source")
    sources = [source] if isinstance(source, str) else list(source or [])
    prints = manifest.data.get("fingerprints", [None] * len(sources))
    other = CacheError(
        f"cache {str(folder)!r}: made with data.source={source!r}, now "
        f"{data.source if isinstance(data.source, str) else list(data.sources)!r} is asked for; set harvest.cache to "
        "another folder, or delete this one"
    )
    if len(sources) != len(data.sources):
        raise other
    for before, fingerprint, requested, label in zip(sources, prints, data.sources, data.labels, strict=True):
        if fingerprint is None:
            if before != requested and (
                Path(before).is_absolute() == Path(requested).is_absolute()
                or expanded(before).resolve() != expanded(requested).resolve()
            ):
                raise other
            continue
        now = _fingerprint(requested, reading_version(manifest.data)) if text or before != label else fingerprint
        if now == fingerprint and (before == label or len(sources) == 1):
            continue
        if before != label:
            raise other
        if now is not None:
            raise CacheError(
                f"cache {str(folder)!r}: the text of data.source={requested!r} has changed since it was made; set "
                "harvest.cache to another folder (or delete this one) to read it again, or put the text back; sae eval "
                "and sae features use the cache without this check"
            )


def reading_version(data: dict[str, Any]) -> int:
    """The version of the reader of a manifest's text."""
    return data.get(TEXT_READING, 1 if TOKEN_COLUMNS in data else 0)


def token_columns(data: DataConfig) -> list[str]:
    cut, by_role = data.section_characters is not None, data.chat_roles is not None
    return [*PLAIN_COLUMNS, *(["sections"] if cut else []), *(["counted"] if by_role else [])]


def data_identity(data: DataConfig) -> dict[str, Any]:
    """The settings that determine the text; with several sources also the weights, as shares that sum to 1."""
    keys = ("subset", "split", "column", "section_characters", "shuffle_documents", "holdout_fraction", "holdout_seed")
    newer = (key for key in ("holdout_by", "tokenizer", "revision") if getattr(data, key) is not None)
    settings = {key: getattr(data, key) for key in (*keys, *newer)}
    if isinstance(data.source, str):
        return {"source": data.source, **settings}
    return {"source": list(data.sources), "weights": list(data.shares), **settings}
