"""Next-token losses and divergences from logits, one context at a time, as a copy of all logits would be large."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.model.tail import Replacement
from sae.results.estimate import double, row_sums


class Compared(NamedTuple):
    """Losses of changed logits, and divergences KL(clean ‖ changed), at every position with a next token."""

    losses: Float[Tensor, " rows"]
    divergences: Float[Tensor, " rows"]


@dataclass(frozen=True)
class CleanPass:
    """The unchanged model at every position with a next token: log-probabilities and probabilities by context."""

    tokens: Int[Tensor, "context seq"]
    log_p: list[Tensor]
    p: list[Tensor]

    @staticmethod
    def of(logits: Float[Tensor, "context seq vocab"], tokens: Int[Tensor, "context seq"]) -> CleanPass:
        """From its logits."""
        log_p = list(_log_probabilities(logits))
        return CleanPass(tokens, log_p, [part.exp() for part in log_p])

    def losses(self) -> Float[Tensor, " rows"]:
        """Its own losses, one context after another."""
        return _losses(self.log_p, self.tokens)

    def compared(self, logits: Float[Tensor, "context seq vocab"]) -> Compared:
        """Losses of changed logits, and their divergences from these."""
        losses, divergences = [], []
        for log_q, log_p, p, ids in zip(_log_probabilities(logits), self.log_p, self.p, self.tokens, strict=True):
            losses.append(_losses([log_q], [ids]))
            divergences.append(row_sums((log_p - log_q).mul_(p)))
        return Compared(torch.cat(losses), torch.cat(divergences))


def losses_of(
    logits: Float[Tensor, "context seq vocab"], tokens: Int[Tensor, "context seq"]
) -> Float[Tensor, " rows"]:  # fmt: skip
    """Losses alone, one context after another."""
    return _losses(_log_probabilities(logits), tokens)


def at_eligible(eligible: Bool[Tensor, "context seq"], new: Replacement) -> Replacement:
    """Replace the activations of eligible positions; all others stay."""

    def replace(x: Float[Tensor, "context seq d_in"]) -> Float[Tensor, "context seq d_in"]:
        out = x.clone()
        out[eligible] = new(x[eligible]).to(x)
        return out

    return replace


def _log_probabilities(logits: Float[Tensor, "context seq vocab"]) -> Iterator[Float[Tensor, "_ vocab"]]:
    """Log-probabilities at positions with a next token.

    Few of these positions do not count; leaving them out here would copy all the others.
    """
    for context_logits in logits:
        yield context_logits[:-1].log_softmax(-1)


def _losses(log_probabilities: Iterable[Tensor], tokens: Iterable[Tensor]) -> Float[Tensor, " rows"]:
    """Next-token losses, one context after another."""
    pairs = zip(log_probabilities, tokens, strict=True)
    return double(torch.cat([-log_p.gather(-1, ids[1:, None])[:, 0] for log_p, ids in pairs]))
