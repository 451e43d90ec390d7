"""Which features are alive, and how often each fires: counted once for every architecture."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_SMALLEST_LIST = 64
"""Fewest candidates in a list of dead features if steps can be replayed and there are any."""


def default_dead_after(d_sae: int, k: int, tokens: int) -> int:
    """Tokens without firing after which a feature is dead: the number in which the average feature fires 64 times.

    It is at least a thousandth of the training, and at most a thirtieth of it or 200,000, whichever is more; never more
    than the ten million of Gao et al. 2024. A feature that does not fire learns nothing, so it must be found before
    much of the training is over (docs/log.md).
    """
    longest = min(10_000_000, max(200_000, tokens // 30))
    return min(longest, max(64 * d_sae // k, tokens // 1000))


class FiringRecord:
    """Counts when and how often each feature fires, on the training device and without waiting for it.

    Args:
        d_sae: number of features.
        dead_after: a feature that has not fired for this many tokens is dead (Gao et al. 2024 use 10 million).
        refresh_every: steps between two listings of the dead features, the only operation that waits for the device.
        is_replayable: whether steps can be recorded and replayed, so that lists have few sizes, and a list of one size
            is always at the same place.

    Attributes:
        silent_tokens: tokens since each feature last fired.
        candidates: the dead features as last listed, ascending; if steps can be replayed, with living ones among them,
            up to a power of two.
        l0: mean L0 of the last batch.
        density: share of the features that fired per token at that listing; 1 before the first.
        counts: tokens on which each feature fired since the counts were last read.
        tokens: tokens since the counts were last read.
    """

    def __init__(
        self, d_sae: int, dead_after: int, device: torch.device, refresh_every: int = 16, *, is_replayable: bool = False
    ) -> None:
        self.dead_after, self.refresh_every, self.is_replayable = dead_after, refresh_every, is_replayable
        self.l0: Float[Tensor, ""] = torch.zeros((), device=device)
        self._lists: dict[int, Int[Tensor, " candidates"]] = {}
        self.silent_tokens: Int[Tensor, " d_sae"] = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.candidates: Int[Tensor, " candidates"] = torch.zeros(0, dtype=torch.int64, device=device)
        self.density = 1.0
        self.counts: Int[Tensor, " d_sae"] = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.tokens = 0

    @property
    def dead(self) -> Bool[Tensor, " d_sae"]:
        """Features that are dead now."""
        return self.silent_tokens >= self.dead_after

    def record(self, counts: Float[Tensor, " d_sae"], l0: Float[Tensor, ""], tokens: int, step: int) -> None:
        """Record a batch: the number of tokens each feature fired on, and the mean L0."""
        self.add(counts, l0, tokens)
        self.after_step(tokens, step)

    def add(self, counts: Float[Tensor, " d_sae"], l0: Float[Tensor, ""], tokens: int) -> None:
        """The part of `record` that is the device's."""
        self.silent_tokens += tokens
        self.silent_tokens.masked_fill_(counts > 0, 0)
        self.counts += counts.to(torch.int64)
        self.l0.copy_(l0)

    def after_step(self, tokens: int, step: int) -> None:
        """The rest of `record`."""
        self.tokens += tokens
        if step % self.refresh_every == 0:
            self.candidates = self._listed()
            self.density = float(self.l0) / len(self.counts)

    def _listed(self) -> Int[Tensor, " candidates"]:
        """The dead features. Waits for the device."""
        dead = self.dead
        if not self.is_replayable:
            return dead.nonzero().flatten()
        count, d_sae = int(dead.sum()), len(dead)
        size = min(max(_SMALLEST_LIST, 1 << (count - 1).bit_length()), d_sae) if count else 0
        if size not in self._lists:
            self._lists[size] = torch.empty(size, dtype=torch.int64, device=dead.device)
        dead_first = dead.to(torch.uint8).argsort(descending=True, stable=True)
        return self._lists[size].copy_(dead_first[:size].sort().values)

    def take_densities(self) -> Float[Tensor, " d_sae"]:
        """Share of the tokens since the last call on which each feature fired."""
        densities = self.counts / max(self.tokens, 1)
        self.counts.zero_()
        self.tokens = 0
        return densities

    def state_dict(self) -> dict[str, Any]:
        return {
            "dead_after": self.dead_after, "silent_tokens": self.silent_tokens, "candidates": self.candidates,
            "density": self.density, "counts": self.counts, "tokens": self.tokens,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dead_after = state.get("dead_after", self.dead_after)
        self.silent_tokens.copy_(state["silent_tokens"])
        self.candidates = state["candidates"].to(self.silent_tokens.device)
        self._lists = {len(self.candidates): self.candidates}
        self.density = state["density"]
        if "counts" in state:  # missing in checkpoints older than their logging
            self.counts.copy_(state["counts"])
            self.tokens = state["tokens"]
