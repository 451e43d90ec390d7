"""The model from its hook point on: changed activations in, next-token logits at chosen positions out."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.language_model import LanguageModel


@dataclass(frozen=True)
class Readout:
    """What the model ends with at some positions.

    Attributes:
        final: the residual stream that enters the final norm, float32.
        logits: of the next token, float32.
    """

    final: Float[Tensor, "context n d_model"]
    logits: Float[Tensor, "context n vocab"]


class Continuation:
    """A language model read at a hook point, and continued from there with other activations.

    Where the hook point enters a block, only that block and the later ones run; elsewhere the model runs from its
    tokens with the activations replaced on the way. Only the positions asked for are unembedded.

    Args:
        language_model: its weights and hooks are left as they are.
        hook: hook point.

    Raises:
        ModelError: the model has no such hook point, or it cannot be replaced.
    """

    def __init__(self, language_model: LanguageModel, hook: str) -> None:
        language_model.check_replaceable(hook)
        self.language_model, self.hook = language_model, hook
        self.layer = language_model.entering_block(hook)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.language_model.device

    def activations(self, tokens: Int[Tensor, "context seq"]) -> Float[Tensor, "context seq d_in"]:
        """The model's own activations at the hook point."""
        return self.language_model.activations(tokens, [self.hook])[self.hook]

    @torch.no_grad()
    def __call__(
        self,
        tokens: Int[Tensor, "context seq"],
        x: Float[Tensor, "context seq d_in"],
        positions: Int[Tensor, "context n"],
    ) -> Readout:
        """Run on with `x` in place of the hook point's activations.

        Args:
            tokens: the contexts, or their beginnings.
            x: activations, one for each token.
            positions: of each context, where the model is read out.
        """
        bridge, final = self.language_model.bridge, []
        outputs = self._outputs if self.layer else 0  # looked at before the hooks below are there

        def keep(residual: Tensor, hook: Any) -> None:
            final.append(_at(residual, positions))

        def only(residual: Tensor, hook: Any) -> Tensor:
            return _at(residual, positions)

        with bridge.hooks(fwd_hooks=[("ln_final.hook_in", keep), ("unembed.hook_in", only)]):
            if self.layer is None:
                with self.language_model.replacing(self.hook, lambda _: x):
                    logits = bridge(tokens)
            else:
                with self._without_earlier_blocks(self.layer, outputs):
                    logits = bridge(x, start_at_layer=self.layer)
        return Readout(final[0].float(), logits.float())

    @contextlib.contextmanager
    def _without_earlier_blocks(self, layer: int, outputs: int) -> Iterator[None]:
        """While open, the blocks before `layer` hand on what they get.

        The bridge runs them and discards what they give; without them the logits are the same.
        """
        blocks = list(self.language_model.bridge.blocks)[:layer]

        def hand_on(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
            return (hidden_states, *[None] * (outputs - 1)) if outputs else hidden_states

        try:
            for block in blocks:
                object.__setattr__(block, "forward", hand_on)  # past the bridge's own, which looks for components
            yield
        finally:
            for block in blocks:
                block.__dict__.pop("forward", None)

    @functools.cached_property
    def _outputs(self) -> int:
        """How many outputs a block of this model has; 0: a tensor that is in no tuple."""
        found: list[int] = []

        def look(_: Any, __: Any, output: Any) -> None:
            found.append(len(output) if isinstance(output, tuple) else 0)

        handle = self.language_model.bridge.blocks[0].register_forward_hook(look)
        try:
            self.language_model.bridge(torch.zeros(1, 2, dtype=torch.long, device=self.device))
        finally:
            handle.remove()
        return found[0]


def _at(x: Float[Tensor, "context seq d"], positions: Int[Tensor, "context n"]) -> Float[Tensor, "context n d"]:
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))
