"""Steers a model with features of a dictionary: changes them while the model runs or generates, and nothing else."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.dictionary.base import Dictionary
from sae.errors import ConfigError, ModelError, UnknownFeatureError
from sae.model.language_model import LanguageModel
from sae.model.passes import Pass
from sae.model.splicing import replacing_by
from sae.numerics.seeding import torch_generator

Mode = Literal["add", "clamp", "scale", "ablate"]
MODES: tuple[Mode, ...] = get_args(Mode)
ALL, PROMPT, GENERATED = "all", "prompt", "generated"
_PLACES = (ALL, PROMPT, GENERATED)


@dataclass(frozen=True)
class Steering:
    """What is done to which features, and at which tokens.

    Attributes:
        features: a value for each feature, in units of its activation; with `ablate`, features alone are enough.
        mode: `add` adds the value to the activation, `clamp` sets the activation to it, `scale` multiplies by it, and
            `ablate` sets the activation to 0. Features that do not fire have the activation 0.
        positions: `all` tokens, those of the `prompt`, those `generated`, or positions in the text, from 0 (with BOS,
            if the text begins with it). Outside of `LanguageModel.generate`, all tokens are those of a prompt, those
            that `hf_model.generate` makes included.
        tokens: only at these tokens: ids, or texts that are one token each; None: at any.

    Raises:
        ConfigError: there is no feature, position or token, a position is negative, a value is missing or not finite,
            or `mode` or `positions` is unknown.
    """

    features: Mapping[int, float] | Sequence[int]
    mode: Mode = "add"
    positions: str | Collection[int] = ALL
    tokens: Collection[int | str] | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode={self.mode!r}: expected one of {', '.join(MODES)}")
        if not self.features:
            raise ConfigError("there is no feature to steer with: give features, as in {123: 8.0}")
        if isinstance(self.positions, str) and self.positions not in _PLACES:
            raise ConfigError(f"positions={self.positions!r}: expected {', '.join(_PLACES)}, or numbers from 0")
        if not isinstance(self.positions, str):
            places = list(self.positions)
            if not places:
                raise ConfigError("there is no position to steer at: give numbers from 0, or positions='all'")
            if negative := [place for place in places if place < 0]:
                raise ConfigError(f"positions: {negative[0]} is negative; positions are counted from the text's start")
        if self.tokens is not None and not isinstance(self.tokens, str) and not list(self.tokens):
            raise ConfigError("there is no token to steer at: give ids or texts, or tokens=None for any")
        if not isinstance(self.features, Mapping) and self.mode != "ablate":
            raise ConfigError(f"mode={self.mode!r}: give a value for each feature, as in {{{self.features[0]}: 8.0}}")
        for feature, value in self.values.items():
            if not math.isfinite(value):
                raise ConfigError(f"feature {feature}: {value} is not a finite number")

    @property
    def values(self) -> dict[int, float]:
        """The value of each feature; 0 if it is ablated."""
        if self.mode != "ablate" and isinstance(self.features, Mapping):
            return dict(self.features)
        return dict.fromkeys(self.features, 0.0)

    def edited(self, features: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """Activations after the change, as if it were at every token."""
        index = torch.tensor(list(self.values), device=features.device)
        value = torch.tensor(list(self.values.values()), dtype=features.dtype, device=features.device)
        before = features[..., index]
        after = {"add": before + value, "scale": before * value}.get(self.mode, value.expand_as(before))
        return features.index_copy(-1, index, after)


@contextlib.contextmanager
def steer(
    language_model: LanguageModel, dictionary: Dictionary,
    features: Steering | Mapping[int, float] | Sequence[int],
    *,
    mode: Mode = "add", positions: str | Collection[int] = ALL, tokens: Collection[int | str] | None = None,
    hook: str | None = None, target_hook: str | None = None, random: int | None = None,
) -> Iterator[LanguageModel]:  # fmt: skip
    """While open, features are changed in every forward pass: of `logits`, `generate`, `bridge` and `hf_model`.

    At each steered token, x becomes x + decode(f′) − decode(f), where f are the features of x and f′ those after the
    change: what the dictionary does not explain of x stays as it is. With `add`, x moves by the value times the
    feature's direction, whether it fires or not. Tokens that the dictionary records as masked out of training (such as
    BOS, first positions) are not steered; without such a record, all are. Blocks may be nested: later ones see what
    earlier ones have changed.

    Steering by adding to activations: Turner et al. 2023 (activation addition); by clamping features: Templeton et al.
    2024.

    Args:
        language_model: the model.
        dictionary: a dictionary of the model, or a transcoder: then x is read at one hook point, and the change is made
            at the other.
        features: a value for each feature, in units of its activation; features alone with `ablate`; or a `Steering`,
            which has the next three arguments, too.
        mode: `add`, `clamp`, `scale` or `ablate`.
        positions: `all`, `prompt`, `generated`, or positions in the text, from 0; see `Steering`.
        tokens: only at these tokens: ids, or texts that are one token each; None: at any.
        hook: hook point that the dictionary reads; None for the one it was trained on.
        target_hook: hook point that it writes; None for the target it was trained on, or `hook` if it has none.
        random: seed of a random direction in which x moves instead, as far as it would move at each token: what any
            change of this size does.

    Raises:
        ConfigError: as for `Steering`; or an entry of `tokens` is not one token of the model.
        UnknownFeatureError: the dictionary has no such feature.
        ModelError: as for `splice`.
    """
    if not isinstance(features, Steering):
        features = Steering(features, mode, positions, tokens)
    elif (mode, positions, tokens) != ("add", ALL, None):
        raise ConfigError("mode, positions and tokens are given twice: a Steering has them already")
    check_features(features.values, dictionary)
    steering, ids = features, _ids(language_model, features.tokens)
    direction = None if random is None else random_direction(random, dictionary)

    def new(x: Tensor, y: Tensor, now: Pass | None) -> Tensor:
        codes = dictionary.encode(x)
        move = change(dictionary, x, codes, steering.edited(codes))
        if direction is not None:
            move = move.norm(dim=-1, keepdim=True) * direction
        if now is None:  # a block by itself
            return y + move
        return torch.where(_steered(steering, ids, now, language_model.prompt_lengths)[..., None], y + move, y)

    with replacing_by(language_model, dictionary, new, hook=hook, target_hook=target_hook):
        yield language_model


def change(
    dictionary: Dictionary,
    x: Float[Tensor, "*batch d_in"],
    features: Float[Tensor, "*batch d_sae"],
    edited: Float[Tensor, "*batch d_sae"],
) -> Float[Tensor, "*batch d_out"]:
    """How far the activation moves if the features of x become others: the only place that turns one into the other."""
    return dictionary.decode(edited, like=x) - dictionary.decode(features, like=x)


def random_direction(seed: int, dictionary: Dictionary) -> Float[Tensor, " d_out"]:
    """A unit vector, uniform over directions."""
    generator = torch_generator("steering: random direction", seed)
    vector = torch.randn(dictionary.d_out, generator=generator, dtype=torch.float32, device="cpu")
    return (vector / vector.norm()).to(dictionary.device, dictionary.dtype)


def check_features(features: Collection[int], dictionary: Dictionary) -> None:
    """Raise UnknownFeatureError if a dictionary lacks one of the features."""
    for feature in features:
        if not 0 <= feature < dictionary.d_sae:
            raise UnknownFeatureError(f"feature {feature}: the dictionary has features 0 to {dictionary.d_sae - 1}")


def _ids(language_model: LanguageModel, tokens: Collection[int | str] | None) -> Int[Tensor, " n"] | None:
    """Ids of tokens."""
    if tokens is None:
        return None
    ids = [language_model.token_id(token) for token in ([tokens] if isinstance(tokens, str) else tokens)]
    return torch.tensor(ids, dtype=torch.int64, device=language_model.device)


def _steered(
    steering: Steering, ids: Int[Tensor, " n"] | None, now: Pass, prompt_lengths: Int[Tensor, " context"] | None
) -> Bool[Tensor, "context seq"]:
    """Mask of the tokens of a pass that are steered."""
    places = now.positions
    mask = places >= 0
    if not isinstance(steering.positions, str):
        mask = mask & torch.isin(places, torch.tensor(list(steering.positions), device=places.device))
    elif steering.positions != ALL:
        generated = torch.zeros_like(mask) if prompt_lengths is None else places >= prompt_lengths[:, None]
        mask = mask & (generated if steering.positions == GENERATED else ~generated)
    if ids is None:
        return mask
    if now.tokens is None:
        raise ModelError("steering at certain tokens: a pass over embeddings has none; give the model token ids")
    return mask & torch.isin(now.tokens, ids)
