"""The number to attribute: a logit of a next token, a difference of two, or a log-probability."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae.errors import ConfigError
from sae.model.language_model import LanguageModel

LogitFunction = Callable[[Tensor], Tensor]
"""Maps next-token logits `[context, seq, vocab]` to one number, or to one per context."""


@dataclass(frozen=True)
class NextToken:
    """The logit ℓ_v of the token v after a position; or ℓ_v − ℓ_u for two tokens; or log p(v) = ℓ_v − log Σ_u exp ℓ_u.

    Called with logits `[context, seq, vocab]`, it returns one number per context, once `resolve` has found the tokens.

    Attributes:
        token: v, as text that is a single token (in most vocabularies with the space before the word) or as an id;
            None: the most likely token, in each context.
        minus: u; None: there is none.
        position: the token after which v is predicted, counted from 0 with BOS; negative: from the end.
        log_probability: log p(v) instead of the logit.

    Raises:
        ConfigError: `minus` is given with `log_probability`.
    """

    token: str | int | None = None
    minus: str | int | None = None
    position: int = -1
    log_probability: bool = False

    def __post_init__(self) -> None:
        if self.minus is not None and self.log_probability:
            raise ConfigError(
                f"minus={self.minus!r} with log_probability: a difference of log-probabilities is that of the logits; "
                "leave out one of them"
            )

    def resolve(
        self, language_model: LanguageModel, logits: Float[Tensor, "context seq vocab"]
    ) -> tuple[LogitFunction, str]:
        """The function of the logits, and its name.

        Args:
            language_model: its tokenizer reads texts of tokens.
            logits: the model's own, which decide which token is the most likely.

        Raises:
            ConfigError: there is no such position, or a text is not a single token.
        """
        _, length, vocabulary = logits.shape
        if not -length <= self.position < length:
            raise ConfigError(
                f"position={self.position}: the text has {length} tokens, BOS included; give {-length} to {length - 1}"
            )
        position = self.position % length
        most_likely = logits[:, position].argmax(-1)
        token = most_likely
        if self.token is not None:
            token = torch.full_like(most_likely, language_model.token_id(self.token, vocabulary))
        minus = None if self.minus is None else language_model.token_id(self.minus, vocabulary)

        def value(logits: Float[Tensor, "context seq vocab"]) -> Float[Tensor, " context"]:
            last = logits[:, position]
            if self.log_probability:
                last = last.log_softmax(-1)
            chosen = last.gather(-1, token[:, None])[:, 0]
            return chosen if minus is None else chosen - last[:, minus]

        same = bool((token == token[0]).all())
        name = repr(_text(language_model, int(token[0]))) if same else "the most likely token"
        kind = "log-probability" if self.log_probability else "logit"
        difference = "" if minus is None else f" minus that of {_text(language_model, minus)!r}"
        return value, f"{kind} of {name}{difference} after position {position}"


def _text(language_model: LanguageModel, token: int) -> str:
    """The text of a token; its id if it is part of a character."""
    return language_model.to_texts([token])[0] or f"<{token}>"


def checked_values(function: LogitFunction, logits: Float[Tensor, "context seq vocab"]) -> Float[Tensor, " values"]:
    """The function's value, or its value in each context.

    Raises:
        ConfigError: it returns something else.
    """
    value = function(logits)
    if (
        not isinstance(value, Tensor)
        or not value.is_floating_point()
        or value.shape not in ((), (1,), logits.shape[:1])
    ):
        found = f"shape {list(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(
            f"of: the function of the logits {list(logits.shape)} returned {found}; return one number, or one for each "
            f"of the {len(logits)} contexts"
        )
    return value.reshape(-1)
