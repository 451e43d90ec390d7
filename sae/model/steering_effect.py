"""What steering does to text: continuations before and after, next to a random direction, with KL divergences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.dictionary.base import Dictionary
from sae.errors import ConfigError
from sae.model.generation import padded
from sae.model.language_model import LanguageModel
from sae.model.splicing import token_policy
from sae.model.steering import Steering, check_features, steer
from sae.numerics.modes import in_own_modes


@dataclass(frozen=True)
class SteeredPrompt:
    """What steering does to one prompt.

    Attributes:
        prompt: the prompt.
        before: its continuation by the model as it is.
        after: its continuation by the steered model.
        random: its continuation with the first random direction.
        kl: KL divergence of the steered model's next-token distribution after the prompt from the model's own, in nats.
        random_kl: the same for each random direction.
    """

    prompt: str
    before: str
    after: str
    random: str
    kl: float
    random_kl: tuple[float, ...]


@dataclass(frozen=True)
class SteeringEffect:
    """What steering does to prompts.

    Attributes:
        steering: the features and what is done to them.
        hook: the hook point at which the model is changed.
        prompts: the effect on each prompt.
        in_prompts: the largest activation of each steered feature on the tokens of the prompts that count.
    """

    steering: Steering
    hook: str
    prompts: tuple[SteeredPrompt, ...]
    in_prompts: Mapping[int, float]

    def to_json(self) -> dict[str, Any]:
        """The effect as plain values."""
        positions, tokens = self.steering.positions, self.steering.tokens
        return {
            "features": {str(feature): value for feature, value in self.steering.values.items()},
            "mode": self.steering.mode,
            "positions": positions if isinstance(positions, str) else list(positions),
            "tokens": None if tokens is None else list(tokens),
            "hook": self.hook,
            "prompts": [asdict(prompt) for prompt in self.prompts],
            "in_prompts": {str(feature): value for feature, value in self.in_prompts.items()},
        }


@in_own_modes
@torch.no_grad()
def measure_steering(
    language_model: LanguageModel, dictionary: Dictionary, prompts: str | Sequence[str],
    features: Steering | Mapping[int, float] | Sequence[int],
    *,
    max_new_tokens: int = 40, seed: int | None = None, temperature: float = 1.0, random_directions: int = 10,
) -> SteeringEffect:  # fmt: skip
    """Continue prompts with and without steering, and with changes of the same length in random directions.

    KL(model ‖ steered) is that of the next token after each prompt, so it is 0 if only generated tokens are steered.

    Args:
        language_model: the model.
        dictionary: a dictionary of the model.
        prompts: one or several prompts, which begin with BOS if contexts of the training did.
        features: a value for each feature, which is added to its activation, or a `Steering`; see `steer`.
        max_new_tokens: tokens to generate after each prompt.
        seed: seed of sampled tokens, the same for every continuation; None: always the most probable token.
        temperature: of the distribution that is sampled from.
        random_directions: number of random directions; the text of the first is kept.

    Raises:
        ConfigError: there is no random direction; or as for `Steering`.
        SaeError: as for `steer` and `LanguageModel.generate`.
    """
    if random_directions < 1:
        raise ConfigError(f"random_directions={random_directions}: expected at least 1")
    steering = features if isinstance(features, Steering) else Steering(features)
    check_features(steering.values, dictionary)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    policy = token_policy(dictionary)
    bos = policy is None or policy.prepend_bos
    rows = language_model.token_rows(texts, prepend_bos=bos)

    def continued() -> list[str]:
        made = language_model.generate(
            texts, max_new_tokens=max_new_tokens, seed=seed, temperature=temperature, prepend_bos=bos
        )
        return [one.text for one in made]

    before, own = continued(), next_tokens(language_model, rows)
    with steer(language_model, dictionary, steering):
        after, steered = continued(), next_tokens(language_model, rows)
    random, nulls = [], []
    for number in range(random_directions):
        with steer(language_model, dictionary, steering, random=number):
            nulls.append(kl_divergence(own, next_tokens(language_model, rows)))
            random = random or continued()
    kl, null = kl_divergence(own, steered).tolist(), torch.stack(nulls, 1).tolist()
    effects = map(SteeredPrompt, texts, before, after, random, kl, map(tuple, null))
    hook = str(dictionary.origin.gives.hook)
    return SteeringEffect(steering, hook, tuple(effects), _in_prompts(language_model, dictionary, rows, steering))


def next_tokens(language_model: LanguageModel, rows: Sequence[Sequence[int]]) -> Float[Tensor, "context vocab"]:
    """Log-probabilities of the next token after each row of ids."""
    tokens, _ = padded(rows, 0, language_model.device, left=False)
    last = torch.tensor([len(row) - 1 for row in rows], device=language_model.device)
    logits = language_model.logits(tokens)
    return logits[torch.arange(len(rows), device=logits.device), last].log_softmax(-1)


def kl_divergence(own: Float[Tensor, "*batch vocab"], other: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch"]:
    """KL(own ‖ other) of log-probabilities, in nats; summed in float64."""
    own, other = own.double(), other.double()
    return (own.exp() * (own - other)).nan_to_num(0.0).sum(-1).clamp_min(0.0)


def _in_prompts(
    language_model: LanguageModel, dictionary: Dictionary, rows: Sequence[Sequence[int]], steering: Steering
) -> dict[int, float]:
    """The largest activation of each steered feature on tokens that count; 0 if it does not fire."""
    largest = dict.fromkeys(steering.values, 0.0)
    hook, policy = dictionary.origin.reads.hook, token_policy(dictionary)
    assert hook is not None  # checked by steering
    for row in rows:
        tokens = torch.tensor([row], device=language_model.device)
        features = dictionary.encode(language_model.activations(tokens, hook)[hook])
        if policy is not None:
            features = features * policy.eligible(tokens)[..., None]
        for feature in largest:
            largest[feature] = max(largest[feature], float(features[..., feature].max()))
    return largest
