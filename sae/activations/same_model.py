"""Checks that a model is the one a cache was made with, by hashes and by its activations on a cached context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.activations.cache import ActivationCache, dequantise
from sae.activations.manifest import RESTORE, Manifest, shard_name
from sae.config.splits import HELD_OUT, SPLITS, TRAIN
from sae.dictionary.model_identity import differs
from sae.errors import CacheError, DamagedError
from sae.files.reading import load_tensors, taken_apart
from sae.model.hooked import BRIDGE
from sae.model.language_model import LanguageModel

READER = "reader"
"""Entry of a manifest's `model` with the library that read the activations; transformer-lens if there is none."""
_ALWAYS = ("weights_sha256", "weight_processing", "dtype", "tokenizer_sha256", "code_sha256")
_IF_RECORDED = ("tokenizer_ids_sha256", "config_sha256")
"""Older caches do not record these."""
_TOLERANCES = {"float32": 0.01}
_OTHER_TOLERANCE = 0.05


def check_same_hashes(folder: Path, manifest: Manifest, language_model: LanguageModel) -> None:
    """Raise CacheError if weights, weight processing, configuration or tokenizer differ from the cache's.

    Names may differ.
    """
    info, recorded = language_model.info.to_json(), manifest.model
    for key in (*_ALWAYS, *_IF_RECORDED):
        if differs(key, recorded, info) if key in _IF_RECORDED else recorded.get(key) != info[key]:
            raise CacheError(
                f"cache {str(folder)!r}: of another model: {key} is {recorded.get(key)!r} there and {info[key]!r} in "
                f"{language_model.info.name!r}; use that model, or set harvest.cache to another folder"
            )


def check_same_model(cache: ActivationCache, language_model: LanguageModel, hook: str | None = None) -> None:
    """Refuse a model that the cache was not made with.

    Args:
        cache: a complete cache.
        language_model: the model.
        hook: hook point whose activations are compared; the first by default.

    Raises:
        CacheError: hashes differ, or the model gives other activations for the first held-out context.
    """
    check_same_hashes(cache.path, cache.manifest, language_model)
    hook = hook or cache.hooks[0]
    split = HELD_OUT if cache.rows(HELD_OUT) else TRAIN
    first = next(cache.contexts(split, hook, batch_contexts=1))
    assert first.activations is not None
    _check_activations(cache.path, cache.manifest, language_model, hook, first.tokens, first.activations)


def check_same_as_before(folder: Path, manifest: Manifest, language_model: LanguageModel) -> None:
    """Refuse a model that an unfinished cache was not started with.

    Raises:
        CacheError: hashes differ, or the model gives other activations for the first context in the cache.
    """
    check_same_hashes(folder, manifest, language_model)
    hook = next(iter(manifest.hooks))
    for split in SPLITS:
        names = [shard_name(part, split, 0) for part in ("tokens", hook)]
        if all(manifest.is_whole(folder, name) for name in names):
            try:
                tokens, shard = (load_shard(folder, manifest, name) for name in names)
            except DamagedError:
                continue  # left to 'sae verify'
            seq = min(manifest.context_length, len(tokens["tokens"]))
            scale = shard.get("scale")
            x = dequantise(shard["activations"][:seq], None if scale is None else scale[:seq])
            context = tokens["tokens"][:seq].long()[None]
            _check_activations(folder, manifest, language_model, hook, context, x[None])
            return


def reading_as_before(
    folder: Path, manifest: Manifest, language_model: LanguageModel
) -> Callable[[Tensor, Sequence[str]], dict[str, Tensor]]:
    """The function that reads activations as those in a cache were read, since libraries round differently.

    Raises:
        CacheError: they cannot be read so here.
    """
    hooks = list(manifest.hooks)
    before, here = manifest.model.get(READER, BRIDGE), language_model.reader(hooks)
    if before == here:
        return language_model.activations
    if before == BRIDGE and language_model.has_bridge:
        return language_model.bridge_activations
    raise CacheError(
        f"cache {str(folder)!r}: its activations were read through {before}, and here they can only be read through "
        f"{here}, which rounds differently: use the libraries that it was started with, or set harvest.cache to "
        "another folder"
    )


def load_shard(folder: Path, manifest: Manifest, name: str) -> dict[str, Tensor]:
    """The tensors of a file of the cache.

    Raises:
        DamagedError: the file is missing, differs from its hash in the manifest, or is damaged.
    """
    path = folder / name
    with taken_apart(path, RESTORE):
        return load_tensors(path, expected=manifest.files[name].sha256, remedy=RESTORE)


def _check_activations(
    folder: Path, manifest: Manifest, language_model: LanguageModel, hook: str, tokens: Int[Tensor, "1 seq"],
    stored: Float[Tensor, "1 seq d_in"],
) -> None:  # fmt: skip
    """Raise CacheError if the model's activations differ from the cache's for at least half of the tokens.

    The tolerance is 1 % of a token's norm in float32 and 5 % in other number types, plus twice the storage error.
    """
    own = language_model.activations(tokens.to(language_model.device), [hook])[hook].float().cpu()
    norms = own.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    difference = float(((own - stored.float()).norm(dim=-1) / norms).median())
    rounding = float(((_rounded(own, manifest.dtype) - own).norm(dim=-1) / norms).median())
    if not difference <= _TOLERANCES.get(language_model.info.dtype, _OTHER_TOLERANCE) + 2 * rounding:
        raise CacheError(
            f"cache {str(folder)!r}: of another model: activations of {language_model.info.name!r} at {hook} differ "
            f"from those in it by {difference:.2g} of their norm, though its weights are the same; use the config.json "
            "and the versions of libraries that the cache was made with, or set harvest.cache to another folder"
        )


def _rounded(x: Float[Tensor, "1 seq d_in"], dtype: str) -> Float[Tensor, "1 seq d_in"]:
    """The activations after storing them in a cache of this number type."""
    if dtype != "int8":
        return x.to(getattr(torch, dtype)).float()
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale.clamp_min(torch.finfo(torch.float32).tiny)).round() * scale
