"""A dictionary at its place in the model, and the paths of its activation along which gradients are taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.dictionary.base import Dictionary
from sae.dictionary.origin import check_belongs, check_sites
from sae.dictionary.saved import weights_sha256
from sae.dictionary.token_policy import TokenPolicy
from sae.effects.attribution import ERROR, GRADIENT_ACTIVATION, AttributedDictionary
from sae.effects.next_token import LogitFunction, checked_values
from sae.errors import ConfigError, ModelError
from sae.model.language_model import LanguageModel
from sae.model.tail import Start, Tail
from sae.numerics.seeding import numpy_generator
from sae.results.estimate import double

_LOGITS = 1 << 24


@dataclass(frozen=True)
class Spliced:
    """A dictionary at its place in the model, on some contexts.

    Attributes:
        dictionary: the dictionary.
        reads, gives: its hook points.
        tail: the model from `gives` on.
        start: the contexts.
        counts: which tokens are not masked.
        x: the activation that it reads.
        y: the activation at `gives`.
        features: f, 0 at masked tokens.
        explained: ŷ(f) − ŷ(0), 0 at masked tokens.
        error: y − ŷ(f), 0 at masked tokens.
    """

    dictionary: Dictionary
    reads: str
    gives: str
    tail: Tail
    start: Start
    counts: Bool[Tensor, "context seq"]
    x: Float[Tensor, "context seq d_in"]
    y: Float[Tensor, "context seq d_out"]
    features: Float[Tensor, "context seq d_sae"]
    explained: Float[Tensor, "context seq d_out"]
    error: Float[Tensor, "context seq d_out"]

    def attributions(self, gradient: Float[Tensor, "context seq d_out"], error_term: bool) -> dict[str, np.ndarray]:
        """Columns of an `Attribution`, from the mean gradient of the function along the path.

        ŷ is affine in f, so that the gradient at f is that at the hook point through the decoder, wherever it is on the
        path.
        """
        to_features = _decoder_gradient(self.dictionary, self.features, self.x, gradient)
        context, position, feature = self.features.nonzero(as_tuple=True)
        activation = self.features[context, position, feature]
        columns = {
            "context": context, "position": position, "feature": feature, "activation": double(activation),
            "attribution": double(activation) * double(to_features[context, position, feature]),
        }  # fmt: skip
        if error_term:
            context, position = self.counts.nonzero(as_tuple=True)
            error = double(self.error[context, position]).cpu()
            errors = {
                "context": context, "position": position, "feature": torch.full_like(context, ERROR),
                "activation": error.norm(dim=-1),
                "attribution": (error * gradient[context.cpu(), position.cpu()]).sum(-1),
            }  # fmt: skip
            columns = {name: torch.cat([column.cpu(), errors[name].cpu()]) for name, column in columns.items()}
        return {name: column.cpu().numpy() for name, column in columns.items()}

    def described(
        self, value: tuple[float, ...], baseline: tuple[float, ...], total: tuple[float, ...]
    ) -> AttributedDictionary:
        """The dictionary in the result."""
        sha256 = weights_sha256(self.dictionary)
        return AttributedDictionary(self.reads, self.gives, self.dictionary.d_sae, sha256, value, baseline, total)


def number_of_parts(spliced: Spliced, groups: int, error_term: bool) -> int:
    """How many `parts_of` gives."""
    groups = min(groups, int(spliced.features.count_nonzero()))
    return groups + error_term if groups > 1 else 1


@torch.no_grad()
def parts_of(spliced: Spliced, groups: int, error_term: bool) -> Iterator[tuple[Spliced, bool]]:
    """What has a path of its own, one after the other: everything, or groups of what fires and the errors.

    With each comes whether the errors are on its path.
    """
    firing = spliced.features.nonzero()
    groups = min(groups, len(firing))
    if groups <= 1:
        yield spliced, error_term
        return
    group = torch.from_numpy(numpy_generator("groups of attributions").permutation(len(firing)) % groups)
    nothing = torch.zeros_like(spliced.features)
    without = _decode(spliced.dictionary, nothing, spliced.x)
    for number in range(groups):
        places = firing[group.to(firing.device) == number].unbind(-1)
        features = nothing.index_put(places, spliced.features[places])
        explained = (_decode(spliced.dictionary, features, spliced.x) - without).to(spliced.y)
        yield replace(spliced, features=features, explained=explained * spliced.counts[..., None]), False
    if error_term:
        yield replace(spliced, features=nothing, explained=torch.zeros_like(spliced.explained)), True


class StraightPath:
    """The straight path of the activation y from features at 0, α = 0, to the model's own, α = 1.

    Args:
        spliced: the dictionary in the model.
        error_term: the error is 0 at α = 0 too, instead of being held.

    Attributes:
        at_once: number of points whose logits are held at once.
    """

    def __init__(self, spliced: Spliced, error_term: bool) -> None:
        self._spliced = spliced
        self._change = spliced.explained + spliced.error if error_term else spliced.explained
        contexts, length = spliced.start.tokens.shape
        vocabulary = int(spliced.tail.language_model.bridge.cfg.d_vocab)
        self.at_once = max(1, _LOGITS // (contexts * length * vocabulary))

    def gradient(
        self, function: LogitFunction, points: Float[Tensor, " n"], weights: Float[Tensor, " n"]
    ) -> Float[Tensor, "context seq d_out"]:
        """Σ_n w_n ∂m/∂y at the points α_n, float64 on the CPU.

        Raises:
            ConfigError: the function does not depend on the logits differentiably.
        """
        y = self._at(points).requires_grad_()
        values = self._values(function, y)
        total = sum(float(weight) * value.sum() for weight, value in zip(weights, values, strict=True))
        if not isinstance(total, Tensor) or not total.requires_grad:
            raise ConfigError("of: the function's result has no gradient; compute it from the logits by torch alone")
        (gradient,) = torch.autograd.grad(total, y)
        return double(gradient).cpu().view(len(points), *self._spliced.y.shape).sum(0)

    @torch.no_grad()
    def value(self, function: LogitFunction, point: float) -> Float[Tensor, " values"]:
        """The function at one point."""
        return self._values(function, self._at(torch.tensor([point], dtype=torch.float64)))[0]

    def _at(self, points: Float[Tensor, " n"]) -> Float[Tensor, "copies seq d_out"]:
        """y at each point, as copies of the contexts."""
        y = self._spliced.y
        points = points.to(y)[:, None, None, None]
        return (y - (1 - points) * self._change).flatten(0, 1)

    def _values(self, function: LogitFunction, y: Float[Tensor, "copies seq d_out"]) -> list[Float[Tensor, " values"]]:
        contexts, length = self._spliced.start.tokens.shape
        copies = torch.arange(contexts, device=y.device).repeat(len(y) // contexts)
        start = self._spliced.start.at(copies, length)
        with self._spliced.tail.replacing(start, lambda _: y):
            logits = self._spliced.tail.language_model.logits(start.tokens)
        return [checked_values(function, part) for part in logits.split(contexts)]


@torch.no_grad()
def spliced_on(
    dictionary: Dictionary, language_model: LanguageModel, tokens: Int[Tensor, "context seq"],
    policy: TokenPolicy | None,
) -> Spliced:  # fmt: skip
    """The dictionary at its place in the model.

    Raises:
        ModelError, ConfigError: it does not belong there, or no token counts.
    """
    origin = dictionary.origin
    reads, gives = origin.reads.hook, origin.gives.hook
    check_sites(origin, gives)
    if reads is None or gives is None:
        raise ModelError("the dictionary does not record its hook point: set dictionary.metadata['hook']='blocks.N.…'")
    check_belongs(origin, language_model.as_place)
    tail = language_model.tail(gives)
    start = tail.start(tokens)
    y = _at_least_float32(tail.activations(start))
    x = _at_least_float32(language_model.bridge_activations(tokens, reads)[reads]) if origin.of_transcoder else y
    for hook, width, expected, verb in (
        (reads, x.shape[-1], dictionary.d_in, "takes"), (gives, y.shape[-1], dictionary.d_out, "gives"),
    ):  # fmt: skip
        if width != expected:
            raise ModelError(f"hook {hook!r}: activations are {width} wide, the dictionary {verb} {expected}")
    counts = torch.ones_like(tokens, dtype=torch.bool) if policy is None else policy.eligible(tokens)
    if not counts.any():
        raise ConfigError(
            f"text: all {tokens.shape[1]} tokens are among those that were masked in training (BOS, first positions, "
            "special tokens); give a longer text"
        )
    x = x.to(dictionary.device)
    features = dictionary.encode(x) * counts[..., None].to(dictionary.device)
    given, nothing = (_decode(dictionary, codes, x).to(y) for codes in (features, torch.zeros_like(features)))
    kept = counts[..., None]
    return Spliced(
        dictionary, reads, gives, tail, start, counts, x, y, features,
        (given - nothing) * kept, (y - given) * kept,
    )  # fmt: skip


def _decode(
    dictionary: Dictionary, features: Float[Tensor, "context seq d_sae"], x: Float[Tensor, "context seq d_in"]
) -> Float[Tensor, "context seq d_out"]:
    """ŷ(f), of a dictionary that has encoded x. This is the only place where attributions decode."""
    return dictionary.decode(features, like=x)


def _decoder_gradient(
    dictionary: Dictionary,
    features: Float[Tensor, "context seq d_sae"],
    x: Float[Tensor, "context seq d_in"],
    gradient: Float[Tensor, "context seq d_out"],
) -> Float[Tensor, "context seq d_sae"]:
    """The gradient at f, from that at ŷ."""
    features = features.detach().requires_grad_()
    given = _decode(dictionary, features, x)
    return torch.autograd.grad(given, features, gradient.to(given))[0]


def quadrature(method: str, steps: int) -> tuple[Float[Tensor, " steps"], Float[Tensor, " steps"]]:
    """Points in (0, 1) and weights of Gauss–Legendre quadrature; for gradient × activation, only the end."""
    if method == GRADIENT_ACTIVATION:
        return torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return torch.from_numpy((1 + nodes) / 2), torch.from_numpy(weights / 2)


def _at_least_float32(activation: Tensor) -> Tensor:
    return activation.to(torch.promote_types(activation.dtype, torch.float32))
