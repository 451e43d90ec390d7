"""Candidates for evaluation: dictionaries of this package, and other objects that encode and decode."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.activations.cache import ActivationCache
from sae.activations.metadata import place_of
from sae.dictionary.base import Dictionary
from sae.dictionary.codes import Codes
from sae.dictionary.model_identity import hash_weights
from sae.dictionary.origin import check_belongs
from sae.dictionary.saved import identify
from sae.errors import ConfigError, FormatError
from sae.evaluation.reconstruction import Reconstruction, Reconstructor, from_dictionary


@runtime_checkable
class Autoencoder(Protocol):
    """The interface of a candidate that is not a `Dictionary`: raw activations in, raw reconstructions out."""

    def encode(self, x: Tensor, /) -> Tensor:
        """Dense features `[rows, d_sae]` of activations `[rows, d_in]`."""
        ...

    def decode(self, features: Tensor, /) -> Tensor:
        """Reconstructions `[rows, d_in]` of features `[rows, d_sae]`."""
        ...


Evaluated = Dictionary | Autoencoder


@dataclass(frozen=True)
class Candidate:
    """A dictionary or other object to evaluate, checked and on its device.

    Attributes:
        reconstructor: computes its reconstructions.
        identity: architecture, shape, settings and a hash of the weights; the hash is None if it is not a module.
        architecture: its name; None if it is not a `Dictionary`.
        d_sae: number of features.
        settings: of its architecture, such as k.
        metadata: of its training.
        skip: its W_skip, if it has one.
    """

    reconstructor: Reconstructor
    identity: dict[str, Any]
    architecture: str | None
    d_sae: int
    settings: Mapping[str, Any]
    metadata: Mapping[str, Any]
    skip: Tensor | None = None


def candidate(
    name: str, thing: Evaluated, cache: ActivationCache, hook: str, device: str | torch.device
) -> Candidate:  # fmt: skip
    """Check a dictionary, or an object with `encode` and `decode`, against the activations.

    A dictionary on another device is copied to this one; other objects are used where they are.

    Raises:
        CacheError: it was trained on another model than that of the activations.
        ConfigError: it was trained on another hook point, or has another width.
        FormatError: its weights are not finite.
    """
    if isinstance(thing, nn.Module):
        _check_finite(name, thing)
    if not isinstance(thing, Dictionary):
        return _object_candidate(name, thing, cache, hook, device)
    check_belongs(thing.origin, place_of(cache), gives=hook)
    is_on_device = thing.W_dec.device == torch.empty(0, device=device).device
    placed = thing if is_on_device else copy.deepcopy(thing).to(device)
    settings = thing.settings()
    settings_text = "".join(f", {key} = {value}" for key, value in {**settings, **thing.frame.to_json()}.items())
    reads = thing.origin.read_elsewhere
    description = f"dictionary: {thing.architecture}, {thing.d_in:,} → {thing.d_sae:,}{settings_text}"
    reconstructor = from_dictionary(placed, description + (f", from {reads}" if reads else ""), reads)
    identity = identify(thing)
    return Candidate(
        reconstructor, identity, thing.architecture, thing.d_sae, settings, thing.metadata, placed.W_skip
    )  # fmt: skip


def _object_candidate(
    name: str, autoencoder: Autoencoder, cache: ActivationCache, hook: str, device: str | torch.device
) -> Candidate:  # fmt: skip
    d_in, kind = cache.d_in(hook), type(autoencoder).__name__
    try:
        features = autoencoder.encode(torch.zeros(2, d_in, device=device))
        reconstructions = autoencoder.decode(features)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{name}: {kind} does not encode and decode activations [2, {d_in}] of {hook!r} ({reason}); give it those "
            "of the model and hook point that it was trained on"
        ) from error
    if features.ndim != 2 or reconstructions.shape != (2, d_in):
        raise ConfigError(
            f"{name}: {kind} made features {list(features.shape)} and reconstructions {list(reconstructions.shape)} of "
            f"activations [2, {d_in}]; expected [2, d_sae] and [2, {d_in}]"
        )
    d_sae = features.shape[1]
    reconstructor = from_object(autoencoder, d_sae, f"dictionary: {kind}, {d_in:,} → {d_sae:,}")
    weights = hash_weights(autoencoder) if isinstance(autoencoder, nn.Module) else None
    identity = {"architecture": kind, "d_in": d_in, "d_sae": d_sae, "weights_sha256": weights}
    return Candidate(reconstructor, identity, None, d_sae, {}, {})


def from_object(thing: Autoencoder, d_sae: int, description: str) -> Reconstructor:
    """An object with `encode` and `decode` as a reconstructor; nonzero features count as firing."""

    def reconstruct(x: Float[Tensor, "rows d_in"]) -> Reconstruction:
        features = thing.encode(x)
        magnitudes = features.detach().abs()
        width = max(1, int((magnitudes > 0).sum(-1).max()))
        indices = magnitudes.topk(width, dim=-1).indices
        codes = Codes(features.detach().gather(-1, indices).float(), indices)
        return Reconstruction(thing.decode(features).detach().float(), codes)

    return Reconstructor(description, d_sae, reconstruct)


def _check_finite(name: str, module: nn.Module) -> None:
    for part, parameter in module.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise FormatError(
                f"{name}: {part} has values that are infinite or not a number; take an earlier checkpoint, or "
                "train again"
            )
