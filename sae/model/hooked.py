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
from sae.model.native import NativeModel, Site
from sae.model.native_sites import MatchingSites, residual_hooks, residual_sites
from sae.model.passes import Pass, Passes

NATIVE, BRIDGE = "transformers", "transformer-lens"
_CAUSAL_TOLERANCE = 1e-3
_PROBE_CONTEXTS, _PROBE_LENGTH = 2, 24


class HookedModel:
    """A transformer-lens bridge and its hook points.

    Activations are read from transformers' own modules where these have the bridge's activations. Everything else needs
    the bridge.

    Args:
        bridge: transformer-lens's `TransformerBridge`; None if it is not installed.
        native: the same model as transformers runs it; None if it cannot be read.
        tokenizer: the Hugging Face tokenizer.
        info: the model's identity.
        device: the model's device.
        rows: number of tokens that the model has embeddings for.

    The arguments other than `native` are kept as attributes.
    """

    def __init__(
        self, bridge: Any, native: NativeModel | None, tokenizer: Any, info: ModelInfo, device: torch.device, rows: int
    ) -> None:
        self._bridge, self._native = bridge, native
        self.tokenizer, self.info, self.device, self.rows = tokenizer, info, device, rows

    @property
    def has_bridge(self) -> bool:
        """Whether there is a bridge, without which activations can only be read."""
        return self._bridge is not None

    @property
    def bridge(self) -> Any:
        """transformer-lens's bridge.

        Raises:
            NoBridgeError: (a ModelError) transformer-lens is not installed.
        """
        if self._bridge is None:
            raise NoBridgeError(
                f"model {self.info.name!r}: this replaces activations or reads logits, which needs transformer-lens: "
                "pip install 'sae[lm]' (without it, harvesting and training work)"
            )
        return self._bridge

    @functools.cached_property
    def _hooks(self) -> dict[str, Hook]:
        if self._bridge is None:
            assert self._native is not None
            return residual_hooks(self._native, self._residual_sites)
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
            more = "" if self.has_bridge else "; others may need transformer-lens: pip install 'sae[lm]'"
            raise ModelError(
                f"hook {hook!r}: block {block} of {self.info.name} has no {kind}; it has {', '.join(kinds)}"
                + (more or hook_points.nearest(kind, kinds, block))
            )
        return block, kind

    def is_residual(self, hook: str) -> bool:
        """Whether activations at `hook` are in the space of the residual stream, which the unembedding reads."""
        return self.check_hook(hook)[1] in hook_points.RESIDUAL

    def activations(
        self, tokens: Int[Tensor, "context seq"], hooks: str | Sequence[str]
    ) -> dict[str, Float[Tensor, "context seq d_in"]]:
        """Activations at one or several hook points, by name, from one pass that stops at the last one.

        Heads are concatenated. The pass is that of `reader`.
        """
        hooks = (hooks,) if isinstance(hooks, str) else hooks
        sites = self._sites(hooks)
        if sites is None or self._native is None:
            return self.bridge_activations(tokens, hooks)
        return self._native.read(tokens, sites)

    def reader(self, hooks: str | Sequence[str]) -> str:
        """The library whose pass gives the activations at these hook points: `transformers` or `transformer-lens`.

        transformers' pass is faster, since it computes attention in one operation. It is used if its activations are
        those of transformer-lens on some tokens (see `MatchingSites`), unless the bridge has hooks, which may change
        activations.
        """
        return BRIDGE if self._sites((hooks,) if isinstance(hooks, str) else hooks) is None else NATIVE

    def _sites(self, hooks: Sequence[str]) -> dict[str, Site] | None:
        """Sites of hook points in transformers' modules; None if activations are to be read from the bridge."""
        for hook in hooks:
            self.check_hook(hook)
        if self._bridge is None:
            return {hook: self._residual_sites[hook] for hook in hooks}
        if self._matching_sites is None or self._has_hooks():
            return None
        return self._matching_sites.of(hooks)

    def _has_hooks(self) -> bool:
        """Whether the bridge has hooks other than its own."""
        return any(not handle.is_permanent for point in self._points for handle in point.fwd_hooks)

    @functools.cached_property
    def _points(self) -> list[Any]:
        return list({id(point): point for point in self.bridge.hook_dict.values()}.values())

    @functools.cached_property
    def _matching_sites(self) -> MatchingSites | None:
        if self._native is None:
            return None
        tokens = self.probe_tokens(_PROBE_CONTEXTS, _PROBE_LENGTH)
        return MatchingSites(self._native, self.bridge, self._hooks, tokens)

    @functools.cached_property
    def _residual_sites(self) -> dict[str, Site]:
        assert self._native is not None
        return residual_sites(self._native, self.probe_tokens(_PROBE_CONTEXTS, _PROBE_LENGTH))

    @torch.no_grad()
    def bridge_activations(
        self, tokens: Int[Tensor, "context seq"], hooks: str | Sequence[str]
    ) -> dict[str, Float[Tensor, "context seq d_in"]]:
        """As `activations`, from a pass of the bridge."""
        hooks = (hooks,) if isinstance(hooks, str) else hooks
        activations: dict[str, Tensor] = {}

        def keep(name: str, activation: Tensor, hook: Any) -> None:
            activations[name] = self._hooks[name].flat(activation.detach()).to(self.device)
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
        return self.bridge(tokens).float().to(self.device)

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
            flat = hook_point.flat(activation).to(self.device)
            new = replacement(flat, passes.now) if with_pass else replacement(flat)  # type: ignore[call-arg]
            return hook_point.unflat(new.to(activation.device), activation)

        with passes.watched(), self.bridge.hooks(fwd_hooks=[(hook, replace)]):
            yield

    @contextlib.contextmanager
    def reading(self, hook: str) -> Iterator[list[Tensor]]:
        """While open, the list holds the activations `[context, seq, d_in]` of the latest pass."""
        self.check_hook(hook)
        latest: list[Tensor] = []
        hook_point = self._hooks[hook]

        def keep(activation: Tensor, hook: Any) -> None:
            latest[:] = [hook_point.flat(activation).to(self.device)]

        with self.bridge.hooks(fwd_hooks=[(hook, keep)]):
            yield latest

    def unembedding(self) -> Float[Tensor, "d_model vocab"]:
        """Logit effect of a residual direction: the final norm's gain (and centring) times the unembedding.

        The final norm's division by the token's own norm is left out, so effects are right up to a positive factor.
        Without a final norm, this is the unembedding alone.
        """
        norm = getattr(self.bridge, "ln_final", None)
        W_U = self.bridge.W_U.detach().float().to(self.device)
        if (
            W_U.shape[0] != self.info.d_model
        ):  # the embedding's width differs from the residual stream's, as in OPT-350M
            project_out = self.bridge.original_model.get_decoder().project_out.weight.detach().float()
            W_U = project_out.T.to(W_U.device) @ W_U
        if norm is None:
            return W_U
        weight = getattr(norm, "weight", None)
        if weight is not None:
            # Gemma's RMSNorm multiplies by 1 + weight.
            offset = float(getattr(norm, "uses_weight_offset", self.bridge.cfg.rmsnorm_uses_offset))
            W_U = (offset + weight.detach().float())[:, None].to(W_U.device) * W_U
        if not self.bridge.cfg.uses_rms_norm:
            W_U = W_U - W_U.mean(0, keepdim=True)
        return W_U

    def check_replaceable(self, hook: str) -> None:
        """Raise ModelError if the hook point cannot be replaced."""
        self.check_hook(hook)
        if refusal := self._hooks[hook].refusal:
            raise (ModelError if self.has_bridge else NoBridgeError)(f"hook {hook!r}: {refusal}")


class NoBridgeError(ModelError):
    """transformer-lens, which is not installed, would be needed."""


class _AllReadError(Exception):
    """Ends a forward pass once every hook point has been read."""
