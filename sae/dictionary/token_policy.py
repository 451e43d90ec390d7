"""Which tokens count in training, statistics and evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class TokenPolicy:
    """Which tokens count in training, statistics and evaluation: decided once, recorded, used everywhere.

    In many models, the first position and BOS have norms far above the rest and would dominate every mean.

    Attributes:
        prepend_bos: every context begins with the BOS token.
        masked_positions: this many positions at the start of every context are left out.
        masked_ids: tokens with these ids are left out.
        chat_roles: in chats, tokens outside the messages of these roles are left out; None: all text of chats counts.
            The cache records which tokens these are.
    """

    prepend_bos: bool
    masked_positions: int
    masked_ids: tuple[int, ...]
    chat_roles: tuple[str, ...] | None = None

    def eligible(
        self, tokens: Int[Tensor, "context seq"] | None, positions: Int[Tensor, "context seq"] | None = None
    ) -> Bool[Tensor, "context seq"]:
        """Mask of the tokens that count, as far as ids and positions decide.

        Args:
            tokens: ids; None if unknown, as in a pass over embeddings: then only positions matter.
            positions: position of each token in its text, −1 for padding, which does not count; None: every context
                starts at the beginning of a text.
        """
        if positions is None:
            assert tokens is not None
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        eligible = positions >= max(self.masked_positions, 0)
        if tokens is not None:
            eligible = eligible & ~torch.isin(
                tokens, torch.tensor(self.masked_ids, dtype=tokens.dtype, device=tokens.device)
            )
        return eligible

    def to_json(self) -> dict[str, Any]:
        record: dict[str, Any] = {
            "prepend_bos": self.prepend_bos,
            "masked_positions": self.masked_positions,
            "masked_ids": list(self.masked_ids),
        }
        return record if self.chat_roles is None else {**record, "chat_roles": list(self.chat_roles)}

    @staticmethod
    def from_json(record: dict[str, Any]) -> TokenPolicy:
        """Inverse of `to_json`.

        Raises:
            KeyError, TypeError: the record is not a token policy.
        """
        bos, positions, ids = record["prepend_bos"], record["masked_positions"], tuple(record["masked_ids"])
        if type(bos) is not bool or any(type(number) is not int or number < 0 for number in (positions, *ids)):
            raise TypeError("a token policy is true or false, a number of positions, and token ids")
        roles = record.get("chat_roles")
        if roles is not None and not (isinstance(roles, list | tuple) and all(type(role) is str for role in roles)):
            raise TypeError("chat_roles must be names")
        return TokenPolicy(bos, positions, ids, None if roles is None else tuple(roles))
