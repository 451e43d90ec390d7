"""A model whose hook points can be read and replaced. Only `sae.model` uses transformer-lens."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.dictionary import hook_points
from sae.errors import ModelError
from sae.files.hub_errors import first_line
from sae.model.hook_probe import Hook, probe_tokens, read_hooks
from sae.model.info import ModelInfo
from sae.model.passes import Pass, Passes

_CAUSAL_TOLERANCE = 1e-3


class HookedModel:
    """A transformer-lens bridge and its hook points.

    Args:
        bridge: transformer-lens's `TransformerBridge`.
        tokenizer: the Hugging Face tokenizer.
        info: the model's identity.
        device: the bridge's device.

    The arguments are kept as attributes.
    """

    def __init__(self, bridge: Any, tokenizer: Any, info: ModelInfo, device: torch.device) -> None:
        self.bridge, self.tokenizer, self.info, self.device = bridge, tokenizer, info, device

    @functools.cached_property
    def _hooks(self) -> dict[str, Hook]:
        try:
            return read_hooks(self.bridge, self._vocabulary, self.device)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ModelError(
                f"model {self.info.name!r}: transformer-lens cannot run it over {self._vocabulary:,} tokens "
                f"({first_line(error)}); use another model"
            ) from error

    @property
    def _vocabulary(self) -> int:
        """Number of ids that both the model's embedding and the tokenizer have."""
        return max(1, min(self.rows, len(self.tokenizer)))

    @property
    def rows(self) -> int:
        """Number of tokens that the model has embeddings for."""
        return int(self.bridge.original_model.get_input_embeddings().weight.shape[0])

    def check_id(self, token: int) -> None:
        """Raise ModelError if the model has no embedding for a token."""
        if token >= self.rows:
            raise ModelError(
                f"model {self.info.name!r}: its tokenizer gives the token "
                f"{self.tokenizer.convert_ids_to_tokens(token)!r} with the id {token:,}, and the model has embeddings "
                f"of {self.rows:,} tokens; load the tokenizer that the model was trained with"
            )

    def probe_tokens(self, contexts: int, length: int) -> Int[Tensor, "context seq"]:
        """Valid but meaningless token ids, to try the model on."""
        return probe_tokens(self._vocabulary, contexts, min(length, self.info.max_context), self.device)

    def check_hook(self, hook: str) -> tuple[int, str]:
        """Block number and kind of a hook point.

        Raises:
            ModelError: it is not a hook point of this model; the message lists the valid ones.
        """
        parts = hook_points.split(hook)
        if parts is None:
            raise ModelError(hook_points.no_hook_point(hook))
        block, kind = parts
        if block >= self.info.n_layers:
            raise ModelError(f"hook {hook!r}: {self.info.name} has blocks 0 to {self.info.n_layers - 1}")
        if hook not in self._hooks:
            kinds = [other.kind for other in self._hooks.values() if other.block == block]
            raise ModelError(
                f"hook {hook!r}: block {block} of {self.info.name} has no {kind}; it has {', '.join(kinds)}"
                + hook_points.nearest(kind, kinds, block)
            )
        return block, kind

    def is_residual(self, hook: str) -> bool:
        """Whether activations at `hook` are in the space of the residual stream, which the unembedding reads."""
        return self.check_hook(hook)[1] in hook_points.RESIDUAL

    @torch.no_grad()
    def activations(
        self, tokens: Int[Tensor, "context seq"], hooks: str | Sequence[str]
    ) -> dict[str, Float[Tensor, "context seq d_in"]]:
        """Activations at one or several hook points, by name, from one pass that stops at the last one.

        Heads are concatenated.
        """
        hooks = (hooks,) if isinstance(hooks, str) else hooks
        activations: dict[str, Tensor] = {}

        def keep(name: str, activation: Tensor, hook: Any) -> None:
            activations[name] = self._hooks[name].flat(activation.detach())
            if len(activations) == len(hooks):
                raise _AllReadError

        for hook in hooks:
            self.check_hook(hook)
        hook_functions = [(hook, functools.partial(keep, hook)) for hook in hooks]
        with contextlib.suppress(_AllReadError), self.bridge.hooks(fwd_hooks=hook_functions):
            self.bridge(tokens)
        return activations

    def logits(self, tokens: Int[Tensor, "context seq"]) -> Float[Tensor, "context seq vocab"]:
        """Next-token logits in float32, with gradients unless the caller disabled them."""
        return self.bridge(tokens).float()

    def check_causal(self) -> None:
        """Raise ModelError if logits depend on later tokens, as those of masked language models do."""
        if self._looks_ahead > _CAUSAL_TOLERANCE:
            raise ModelError(
                f"{self.info.name} is not a causal language model: its logits change by {self._looks_ahead:.2g} of the "
                "largest if a later token changes, so it has no next-token loss"
            )

    @functools.cached_property
    @torch.no_grad()
    def _looks_ahead(self) -> float:
        """Largest change of earlier logits when the last token changes, as a share of the largest logit."""
        tokens = self.probe_tokens(2, 16)
        changed = tokens.clone()
        changed[:, -1] = (tokens[:, -1] + 1) % self._vocabulary
        before, after = (self.logits(x)[:, :-1].nan_to_num() for x in (tokens, changed))
        return float((after - before).abs().max() / before.abs().max().clamp_min(1e-30))

    @contextlib.contextmanager
    def replacing(
        self, hook: str, replacement: Callable[[Tensor], Tensor] | Callable[[Tensor, Pass | None], Tensor],
        *, with_pass: bool = False,
    ) -> Iterator[None]:  # fmt: skip
        """While open, every forward pass of `bridge` has the hook point's activations replaced.

        Args:
            hook: hook point.
            replacement: maps activations `[context, seq, d_in]` to the same shape.
            with_pass: also give `replacement` the tokens of the pass and their positions, or None if a block is called
                by itself.
        """
        self.check_replaceable(hook)
        hook_point, passes = self._hooks[hook], Passes(self.bridge.original_model)

        def replace(activation: Tensor, hook: Any) -> Tensor:
            flat = hook_point.flat(activation)
            new = replacement(flat, passes.now) if with_pass else replacement(flat)  # type: ignore[call-arg]
            return hook_point.unflat(new, activation)

        with passes.watched(), self.bridge.hooks(fwd_hooks=[(hook, replace)]):
            yield

    @contextlib.contextmanager
    def reading(self, hook: str) -> Iterator[list[Tensor]]:
        """While open, the list holds the activations `[context, seq, d_in]` of the latest pass."""
        self.check_hook(hook)
        latest: list[Tensor] = []
        hook_point = self._hooks[hook]

        def keep(activation: Tensor, hook: Any) -> None:
            latest[:] = [hook_point.flat(activation)]

        with self.bridge.hooks(fwd_hooks=[(hook, keep)]):
            yield latest

    def unembedding(self) -> Float[Tensor, "d_model vocab"]:
        """Logit effect of a residual direction: the final norm's gain (and centring) times the unembedding.

        The final norm's division by the token's own norm is left out, so effects are right up to a positive factor.
        Without a final norm, this is the unembedding alone.
        """
        norm = getattr(self.bridge, "ln_final", None)
        W_U = self.bridge.W_U.detach().float()
        if (
            W_U.shape[0] != self.info.d_model
        ):  # the embedding's width differs from the residual stream's, as in OPT-350M
            W_U = self.bridge.original_model.get_decoder().project_out.weight.detach().float().T @ W_U
        if norm is None:
            return W_U
        weight = getattr(norm, "weight", None)
        if weight is not None:
            # Gemma's RMSNorm multiplies by 1 + weight.
            offset = float(getattr(norm, "uses_weight_offset", self.bridge.cfg.rmsnorm_uses_offset))
            W_U = (offset + weight.detach().float())[:, None] * W_U
        if not self.bridge.cfg.uses_rms_norm:
            W_U = W_U - W_U.mean(0, keepdim=True)
        return W_U

    def check_replaceable(self, hook: str) -> None:
        """Raise ModelError if the hook point cannot be replaced."""
        self.check_hook(hook)
        if refusal := self._hooks[hook].refusal:
            raise ModelError(f"hook {hook!r}: {refusal}")


class _AllReadError(Exception):
    """Ends a forward pass once every hook point has been read."""
