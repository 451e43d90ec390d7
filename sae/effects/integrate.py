"""Attribute a function of the logits to features: gradients along a path of activations, times activations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.config.progress import Progress, silent
from sae.dictionary.base import Dictionary
from sae.dictionary.token_policy import TokenPolicy
from sae.effects.attribution import (
    GRADIENT_ACTIVATION,
    INTEGRATED_GRADIENTS,
    METHODS,
    AttributedDictionary,
    Attribution,
)
from sae.effects.attribution_paths import StraightPath, number_of_parts, parts_of, quadrature, spliced_on
from sae.effects.next_token import LogitFunction, NextToken, checked_values
from sae.errors import ConfigError, ModelError
from sae.model.language_model import LanguageModel
from sae.model.splicing import token_policy
from sae.numerics.modes import training_mode

_STEPS, _MOST_STEPS = 16, 1000


def attribute(
    dictionary: Dictionary | Sequence[Dictionary],
    language_model: LanguageModel,
    text: str | Sequence[str] | Tensor,
    *,
    of: str | NextToken | LogitFunction | None = None,
    method: str | None = None,
    steps: int | None = None,
    groups: int | None = None,
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
      to m(f) − m(0), the more exactly the more steps. The integral is Gauss–Legendre quadrature. In groups, each group
      has a path on which it alone begins at 0.

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
        method: `gradient_activation`, which predicts the effect of one feature better than one path does
            (docs/guides/attribute.md), or `integrated_gradients`, whose attributions add up; None: the former, or the
            latter if steps or groups are given.
        steps: number of gradients along each path of integrated gradients; None: 16.
        groups: what fires is divided at random into so many groups of about the same size. Each has a path of its own,
            on which it begins at 0 and all else stays as it is, so that its attributions add up to the effect of its
            removal. The more groups, the closer an attribution is to the effect of its feature alone, and the less
            the sum of all says. None: 1.
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
    method, steps, groups = _checked_method(dictionaries, method, steps, groups)
    with training_mode():
        policies = [token_policy(one) for one in dictionaries]
        tokens = _tokens(language_model, text, policies)
        splices = [
            spliced_on(one, language_model, tokens, policy) for one, policy in zip(dictionaries, policies, strict=True)
        ]
        with torch.no_grad():
            logits = language_model.logits(tokens)
            function, name = _function(of, language_model, logits)
            value = checked_values(function, logits)
        total = steps * sum(number_of_parts(spliced, groups, error_term) for spliced in splices)
        done, report = 0, progress or silent
        report("attribute", 0, total)
        parts: list[dict[str, np.ndarray]] = []
        results: list[AttributedDictionary] = []
        for number, spliced in enumerate(splices):
            points, weights = quadrature(method, steps)
            found: list[dict[str, np.ndarray]] = []
            for part, errors in parts_of(spliced, groups, error_term):
                path = StraightPath(part, errors)
                gradient = torch.zeros_like(part.explained, dtype=torch.float64, device="cpu")
                for some, their in zip(points.split(path.at_once), weights.split(path.at_once), strict=True):
                    gradient += path.gradient(function, some, their)
                    done += len(some)
                    report("attribute", done, total)
                found.append(part.attributions(gradient, errors))
            columns = _in_order(found)
            baseline = StraightPath(spliced, error_term).value(function, 0.0)
            totals = _totals(columns, len(value))
            results.append(spliced.described(_numbers(value), _numbers(baseline), totals))
            parts.append({"dictionary": np.full(len(columns["context"]), number), **columns})
        joined = {column: np.concatenate([part[column] for part in parts]) for column in parts[0]}
        return Attribution(
            of=name, method=method, steps=steps, error_term=error_term, model=language_model.info.to_json(),
            tokens=tokens.cpu().numpy(), texts=tuple(map(tuple, language_model.to_texts(tokens))),
            dictionaries=tuple(results), groups=groups, **joined,
        )  # fmt: skip


def _in_order(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The columns of all parts, by context, position and feature."""
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort([columns[name] for name in ("feature", "position", "context")])
    return {name: column[order] for name, column in columns.items()}


def _checked_method(
    dictionaries: Sequence[Dictionary], method: str | None, steps: int | None, groups: int | None
) -> tuple[str, int, int]:
    """The method, the number of gradients along a path, and the number of paths.

    Raises:
        ConfigError: there is no dictionary or no such method, or the number is out of range or has no effect.
    """
    if method is None:
        method = GRADIENT_ACTIVATION if steps is None and groups is None else INTEGRATED_GRADIENTS
    if not dictionaries:
        raise ConfigError("dictionary: expected at least one; the list is empty")
    if method not in METHODS:
        raise ConfigError(f"method={method!r}: expected {' or '.join(METHODS)}")
    for name, given in (("steps", steps), ("groups", groups)):
        if method == GRADIENT_ACTIVATION and given is not None:
            raise ConfigError(
                f"{name}={given}: {GRADIENT_ACTIVATION} has no path; leave {name} out, or choose another method"
            )
    if steps is None:
        steps = 1 if method == GRADIENT_ACTIVATION else _STEPS
    groups = 1 if groups is None else groups
    for name, number in (("steps", steps), ("groups", groups)):
        if not 1 <= number <= _MOST_STEPS:
            raise ConfigError(f"{name}={number}: expected 1 to {_MOST_STEPS:,}")
    return method, steps, groups


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
    sums = np.bincount(context, weights=columns["attribution"], minlength=values)
    return tuple(sums.astype(np.float64).tolist())  # those of nothing are integers, whatever the weights


def _numbers(values: Float[Tensor, " values"]) -> tuple[float, ...]:
    return tuple(values.double().tolist())
