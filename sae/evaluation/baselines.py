"""Baselines that a dictionary is compared with: principal components, a random dictionary, linear maps, identity."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sae.activations.cache import ActivationCache
from sae.architectures.topk import TopK
from sae.config.progress import Progress, silent
from sae.dictionary.codes import Codes
from sae.evaluation.budget import pca_tokens
from sae.evaluation.held_out import HeldOut, training_blocks
from sae.evaluation.linear_maps import fit_linear, skip_alone
from sae.evaluation.reconstruction import Reconstruction, Reconstructor
from sae.numerics.seeding import torch_generator
from sae.results.estimate import double

GAIN_TOKENS = 4096
Skips = Mapping[str, Tensor]
"""W_skip of dictionaries that have one, by name."""
_NO_SKIPS: Skips = MappingProxyType({})


@dataclass(frozen=True)
class Baseline:
    """Description of a baseline; equal ones are fitted once, however many dictionaries are compared with them.

    Attributes:
        kind: principal components, a random dictionary, the best affine map from what a transcoder reads, a
            dictionary's own skip connection, a frozen decoder (`frozen_decoder.py`), or x̂ = x.
        k: components, or features of the dictionary that fire.
        d_sae: features of the dictionary.
        architecture: of the frozen decoder's encoder.
        prefixes: of that architecture, if it is nested.
        reads: hook point that is read, if it differs from the one that is reconstructed.
        dictionary: name of the dictionary whose skip connection it is.
    """

    kind: Literal["pca", "random", "linear", "skip", "frozen_decoder", "identity"]
    k: int = 0
    d_sae: int = 0
    architecture: str = ""
    prefixes: tuple[float, ...] = ()
    reads: str | None = None
    dictionary: str = ""


IDENTITY = Baseline("identity")


def fit_baselines(
    wanted: Iterable[Baseline], held_out: HeldOut, skips: Skips = _NO_SKIPS
) -> dict[Baseline, Reconstructor]:
    """Fit baselines on training activations, those that differ only in k together; frozen decoders are left out.

    Args:
        wanted: the baselines.
        held_out: the activations that are reconstructed.
        skips: those that baselines name.

    Raises:
        CacheError: a training activation is not finite.
    """
    wanted, cache, hook, device = list(wanted), held_out.cache, held_out.hook, held_out.device
    reconstructors: dict[Baseline, Reconstructor] = {}
    if any(baseline.kind == "pca" for baseline in wanted):
        components = fit_pca(cache, hook, device, progress=held_out.progress)
        reconstructors |= {
            baseline: components.reconstructor(baseline.k) for baseline in wanted if baseline.kind == "pca"
        }
    widths = {baseline.d_sae for baseline in wanted if baseline.kind == "random"}
    for d_sae in widths:
        ks = {
            baseline: min(baseline.k, d_sae)
            for baseline in wanted
            if baseline.kind == "random" and baseline.d_sae == d_sae
        }
        dictionary = RandomDictionary(cache, hook, d_sae, set(ks.values()), device)
        reconstructors |= {baseline: dictionary.reconstructor(k) for baseline, k in ks.items()}
    reads = {baseline.reads for baseline in wanted if baseline.kind == "linear" and baseline.reads is not None}
    maps = fit_linear(cache, reads, hook, device, progress=held_out.progress)
    for baseline in wanted:
        if baseline.kind == "linear" and baseline.reads is not None:
            reconstructors[baseline] = maps[baseline.reads]
        elif baseline.kind == "skip":
            reconstructors[baseline] = skip_alone(skips[baseline.dictionary], held_out, baseline.reads)
    if IDENTITY in wanted:
        reconstructors[IDENTITY] = identity()
    return reconstructors


def identity() -> Reconstructor:
    """x̂ = x, a perfect reconstruction."""
    return Reconstructor("identity: x̂ = x", 0, Reconstruction)


@dataclass(frozen=True)
class PrincipalComponents:
    """Mean μ and eigenvectors V of the covariance of activations.

    Attributes:
        mean: μ.
        vectors: V, the leading one first.
        tokens: number of tokens they were fitted on.
    """

    mean: Float[Tensor, " d_in"]
    vectors: Float[Tensor, "d_in d_in"]
    tokens: int

    def reconstructor(self, components: int) -> Reconstructor:
        """x̂ = μ + V Vᵀ (x − μ) with the leading components: of all affine maps of that rank, the one of least mse
        (Eckart and Young 1936).
        """
        components = min(components, len(self.mean))
        V, mean = self.vectors[:, :components].contiguous(), self.mean

        def reconstruct(x: Float[Tensor, "rows d_in"]) -> Reconstruction:
            values = (x - mean) @ V
            indices = torch.arange(components, device=x.device).expand(values.shape)
            return Reconstruction(values @ V.T + mean, Codes(values, indices))

        description = f"PCA: {components} principal components, fitted on {self.tokens:,} tokens"
        return Reconstructor(description, components, reconstruct)


def fit_pca(
    cache: ActivationCache, hook: str, device: str | torch.device = "cpu", *,
    progress: Progress | None = None, max_tokens: int | None = None,
) -> PrincipalComponents:  # fmt: skip
    """Mean and covariance of eligible training tokens, streamed in float64, and the covariance's eigenvectors.

    Args:
        cache: its training tokens are read, at equal distances.
        hook: hook point.
        device: where products are computed.
        progress: called with (stage, tokens done, total).
        max_tokens: upper limit; None: one in 32 cached tokens, at least 16,384 and 64 · d_in, at most 200,000.

    Raises:
        CacheError: a training activation is not finite.
    """
    shift = cache.statistics(hook).mean.double()
    tokens, total, products = 0, torch.zeros_like(shift), shift.new_zeros(len(shift), len(shift))
    report = progress or silent
    max_tokens = pca_tokens(cache, hook) if max_tokens is None else max_tokens
    limit = min(max_tokens, cache.statistics(hook).tokens)
    report("principal components", 0, limit)
    for block in training_blocks(cache, hook, max_tokens):
        x = double(block.to(device))
        centred = x - shift.to(x.device)
        tokens += len(x)
        total += centred.sum(0).cpu()
        products += (centred.T @ centred).cpu()
        report("principal components", tokens, limit)
    offset = total / tokens
    vectors = torch.linalg.eigh(products / tokens - torch.outer(offset, offset)).eigenvectors
    return PrincipalComponents((shift + offset).float().to(device), vectors.flip(-1).float().to(device), tokens)


class RandomDictionary:
    """x̂ = b + f W with f = topk_k(ReLU(g · W (x − b))): unit rows of W drawn from the sphere, b the training mean.

    The k features with the largest inner products are kept unchanged, without matching pursuit. Random rows overlap,
    so their sum overshoots; one gain g = Σ(x − b)·y / Σ‖y‖², with y the reconstruction of x − b at g = 1, is fitted to
    training tokens by least squares. Without it the baseline could score worse than the mean.

    Dictionaries that differ only in k share their directions and encode only once.

    Args:
        cache: its training mean is b, and its training tokens fit the gains.
        hook: hook point.
        d_sae: number of directions.
        ks: the numbers of features that may fire.
        device: where reconstructions are computed.
        seed: of the directions.
    """

    def __init__(
        self, cache: ActivationCache, hook: str, d_sae: int, ks: Collection[int], device: str | torch.device = "cpu",
        *, seed: int = 0,
    ) -> None:  # fmt: skip
        d_in = cache.d_in(hook)
        self.dictionary = TopK(d_in, d_sae, k=max(ks)).requires_grad_(False)
        self.dictionary.W_dec.copy_(torch.randn(d_sae, d_in, generator=torch_generator("random dictionary", seed)))
        self.dictionary.normalise_decoder_()
        self.dictionary.W_enc.copy_(self.dictionary.W_dec.T)
        self.dictionary.b_dec.copy_(cache.statistics(hook).mean)
        self.dictionary.to(device)
        self._last: tuple[Tensor, Codes] | None = None
        product, power = dict.fromkeys(ks, 0.0), dict.fromkeys(ks, 0.0)
        for block in training_blocks(cache, hook, GAIN_TOKENS):
            x = block.to(device)
            target = double(x - self.dictionary.b_dec)
            for k in ks:
                y = double(self.dictionary.decode_sparse(self._codes(x, k)) - self.dictionary.b_dec)
                product[k] += float((target * y).sum())
                power[k] += float(y.square().sum())
        self.gains = {k: product[k] / power[k] if power[k] > 0 else 1.0 for k in ks}

    def reconstructor(self, k: int) -> Reconstructor:
        """The reconstructor in which k features may fire; k is one of `ks`."""
        gain, d_sae = self.gains[k], self.dictionary.d_sae

        def reconstruct(x: Float[Tensor, "rows d_in"]) -> Reconstruction:
            values, indices = self._codes(x, k)
            codes = Codes(gain * values, indices)
            return Reconstruction(self.dictionary.decode_sparse(codes), codes)

        description = f"random: {d_sae:,} random directions, top {k}, one fitted gain ({gain:.3g})"
        return Reconstructor(description, d_sae, reconstruct)

    def _codes(self, x: Float[Tensor, "rows d_in"], k: int) -> Codes:
        """The k strongest features without gain; computed once for consecutive calls with the same tensor."""
        if self._last is None or self._last[0] is not x:
            self._last = x, self.dictionary.encode_sparse(x)
        values, indices = self._last[1]
        return Codes(values[:, :k], indices[:, :k])
