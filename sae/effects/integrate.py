"""Attribute a function of the logits to features: gradients along a path of activations, times activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.config.progress import Progress, silent
from sae.dictionary.base import Dictionary
from sae.dictionary.origin import check_belongs
from sae.dictionary.saved import weights_sha256
from sae.dictionary.token_policy import TokenPolicy
from sae.effects.attribution import (
    ERROR,
    GRADIENT_ACTIVATION,
    INTEGRATED_GRADIENTS,
    METHODS,
    AttributedDictionary,
    Attribution,
)
from sae.effects.next_token import LogitFunction, NextToken, checked_values
from sae.errors import ConfigError, ModelError
from sae.model.language_model import LanguageModel
from sae.model.splicing import token_policy
from sae.model.tail import Start, Tail
from sae.numerics.modes import training_mode
from sae.results.estimate import double

_LOGITS = 1 << 24
_STEPS, _MOST_STEPS = 16, 1000


def attribute(
    dictionary: Dictionary | Sequence[Dictionary],
    language_model: LanguageModel,
    text: str | Sequence[str] | Tensor,
    *,
    of: str | NextToken | LogitFunction | None = None,
    method: str | None = None,
    steps: int | None = None,
    error_term: bool = False,
    progress: Progress | None = None,
) -> Attribution:
    """Attribute a function of the logits to the features of dictionaries, at every position.

    The dictionary is spliced in with its error, so that the model's output is unchanged: y = ŷ(f) + e, where y is the
    activation at the hook point, ŷ(f) = f W_dec + b_dec, and e the part that the dictionary does not explain. With the
    function m of the logits, and f the features at all positions:

    - gradient × activation: a_i = f_i · ∂m/∂f_i at the model's own f, the change of m to first order if f_i becomes 0
      (with the opposite sign).
    - integrated gradients (Sundararajan et al. 2017, "Axiomatic Attribution for Deep Networks"):
      a_i = f_i · ∫₀¹ ∂m/∂f_i(α f) dα, from all features at 0 to their activations, with e held. The attributions add up
      to m(f) − m(0), the more exactly the more steps. The integral is Gauss–Legendre quadrature.

    Nothing else in the model is held: what a feature does through later layers is part of its attribution, and each of
    several dictionaries is attributed to on its own. For a transcoder, y is the activation at its target, and f comes
    from the activation that it reads. Masked tokens (BOS, first positions) keep their activation and have no entries.

    Args:
        dictionary: one that takes raw activations, or several, for any hook points. They are not modified.
        language_model: the model they were trained on.
        text: a text, several texts of the same number of tokens, or ids `[context, seq]` or `[seq]`. Texts begin with
            BOS if the dictionaries' training contexts did.
        of: what to attribute: a `NextToken`; the text of a token, for its logit after the last position; a
            differentiable function from logits `[context, seq, vocab]` to one number, or one per context; None: the
            logit of the most likely token after the last position.
        method: `gradient_activation`, which predicts the effect of one feature better (docs/guides/attribute.md), or
            `integrated_gradients`, whose attributions add up; None: the former, or the latter if steps are given.
        steps: number of gradients along the path of integrated gradients; None: 16.
        error_term: also attribute to e, one entry per position. Integrated gradients then begin with f and e at 0.
        progress: called with (stage, gradients done, gradients in total).

    Returns:
        Attributions to every feature that fires, with the completeness gap of each dictionary.

    Raises:
        ConfigError: a setting is out of range; there is no such token or position; `of` returns something else, or no
            function of the logits; no token of the text counts; or the dictionaries begin contexts differently.
        ModelError: a dictionary belongs to another model; its hook point is unknown or cannot be replaced; or the text
            is longer than the model's context.
    """
    dictionaries = [dictionary] if isinstance(dictionary, Dictionary) else list(dictionary)
    method, steps = _checked_method(dictionaries, method, steps)
    with training_mode():
        policies = [token_policy(one) for one in dictionaries]
        tokens = _tokens(language_model, text, policies)
        splices = [
            _splice(one, language_model, tokens, policy) for one, policy in zip(dictionaries, policies, strict=True)
        ]
        with torch.no_grad():
            logits = language_model.logits(tokens)
            function, name = _function(of, language_model, logits)
            value = checked_values(function, logits)
        done, total, report = 0, steps * len(splices), progress or silent
        report("attribute", 0, total)
        parts: list[dict[str, np.ndarray]] = []
        results: list[AttributedDictionary] = []
        for number, spliced in enumerate(splices):
            points, weights = _quadrature(method, steps)
            path = _Path(spliced, error_term)
            gradient = torch.zeros_like(spliced.explained, dtype=torch.float64, device="cpu")
            for some, their in zip(points.split(path.at_once), weights.split(path.at_once), strict=True):
                gradient += path.gradient(function, some, their)
                done += len(some)
                report("attribute", done, total)
            columns = spliced.attributions(gradient, error_term)
            baseline = path.value(function, 0.0)
            totals = _totals(columns, len(value))
            results.append(spliced.described(_numbers(value), _numbers(baseline), totals))
            parts.append({"dictionary": np.full(len(columns["context"]), number), **columns})
        joined = {column: np.concatenate([part[column] for part in parts]) for column in parts[0]}
        return Attribution(
            of=name, method=method, steps=steps, error_term=error_term, model=language_model.info.to_json(),
            tokens=tokens.cpu().numpy(), texts=tuple(map(tuple, language_model.to_texts(tokens))),
            dictionaries=tuple(results), **joined,
        )  # fmt: skip


@dataclass(frozen=True)
class _Spliced:
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
        columns = {name: column.cpu().numpy() for name, column in columns.items()}
        order = np.lexsort([columns[name] for name in ("feature", "position", "context")])
        return {name: column[order] for name, column in columns.items()}

    def described(
        self, value: tuple[float, ...], baseline: tuple[float, ...], total: tuple[float, ...]
    ) -> AttributedDictionary:
        """The dictionary in the result."""
        sha256 = weights_sha256(self.dictionary)
        return AttributedDictionary(self.reads, self.gives, self.dictionary.d_sae, sha256, value, baseline, total)


class _Path:
    """The straight path of the activation y from features at 0, α = 0, to the model's own, α = 1.

    Args:
        spliced: the dictionary in the model.
        error_term: the error is 0 at α = 0 too, instead of being held.

    Attributes:
        at_once: number of points whose logits are held at once.
    """

    def __init__(self, spliced: _Spliced, error_term: bool) -> None:
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
def _splice(
    dictionary: Dictionary, language_model: LanguageModel, tokens: Int[Tensor, "context seq"],
    policy: TokenPolicy | None,
) -> _Spliced:  # fmt: skip
    """The dictionary at its place in the model.

    Raises:
        ModelError, ConfigError: it does not belong there, or no token counts.
    """
    origin = dictionary.origin
    reads, gives = origin.reads.hook, origin.gives.hook
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
    return _Spliced(
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


def _quadrature(method: str, steps: int) -> tuple[Float[Tensor, " steps"], Float[Tensor, " steps"]]:
    """Points in (0, 1) and weights of Gauss–Legendre quadrature; for gradient × activation, only the end."""
    if method == GRADIENT_ACTIVATION:
        return torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return torch.from_numpy((1 + nodes) / 2), torch.from_numpy(weights / 2)


def _checked_method(dictionaries: Sequence[Dictionary], method: str | None, steps: int | None) -> tuple[str, int]:
    """The method, and the number of gradients along its path.

    Raises:
        ConfigError: there is no dictionary or no such method, or the number is out of range or has no effect.
    """
    if method is None:
        method = GRADIENT_ACTIVATION if steps is None else INTEGRATED_GRADIENTS
    if not dictionaries:
        raise ConfigError("dictionary: expected at least one; the list is empty")
    if method not in METHODS:
        raise ConfigError(f"method={method!r}: expected {' or '.join(METHODS)}")
    if method == GRADIENT_ACTIVATION and steps is not None:
        raise ConfigError(
            f"steps={steps}: {GRADIENT_ACTIVATION} has no path; leave steps out, or choose another method"
        )
    if steps is None:
        steps = 1 if method == GRADIENT_ACTIVATION else _STEPS
    if not 1 <= steps <= _MOST_STEPS:
        raise ConfigError(f"steps={steps}: expected 1 to {_MOST_STEPS:,}")
    return method, steps


def _tokens(
    language_model: LanguageModel, text: str | Sequence[str] | Tensor, policies: Sequence[TokenPolicy | None]
) -> Int[Tensor, "context seq"]:
    """The ids of the text.

    Raises:
        ConfigError: the dictionaries begin contexts differently.
        ModelError: there is no text, or it is too long.
    """
    if isinstance(text, Tensor):
        tokens = (text if text.ndim > 1 else text[None]).to(language_model.device)
        if not tokens.numel():
            raise ModelError("text: there are no tokens; give ids [context, seq]")
    else:
        begins = {policy.prepend_bos for policy in policies if policy is not None} or {True}
        if len(begins) > 1:
            raise ConfigError(
                "text: some of the dictionaries were trained on contexts that begin with BOS, others not; pass ids, "
                "such as model.to_tokens(text, prepend_bos=True)"
            )
        tokens = language_model.to_tokens(text, prepend_bos=begins.pop())
    if tokens.shape[1] > language_model.info.max_context:
        info = language_model.info
        raise ModelError(f"text: {tokens.shape[1]:,} tokens, and {info.name} reads at most {info.max_context:,}")
    return tokens


def _function(
    of: str | NextToken | LogitFunction | None,
    language_model: LanguageModel,
    logits: Float[Tensor, "context seq vocab"],
) -> tuple[LogitFunction, str]:
    """The function of the logits, and its name."""
    if of is None or isinstance(of, str):
        of = NextToken(of)
    if isinstance(of, NextToken):
        return of.resolve(language_model, logits)
    return of, getattr(of, "__name__", type(of).__name__)


def _totals(columns: dict[str, np.ndarray], values: int) -> tuple[float, ...]:
    """The sum of the attributions for each value of the function."""
    context = columns["context"] if values > 1 else np.zeros_like(columns["context"])
    return tuple(np.bincount(context, weights=columns["attribution"], minlength=values).tolist())


def _numbers(values: Float[Tensor, " values"]) -> tuple[float, ...]:
    return tuple(values.double().tolist())


def _at_least_float32(activation: Tensor) -> Tensor:
    return activation.to(torch.promote_types(activation.dtype, torch.float32))
