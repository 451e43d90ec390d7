"""The language model: read a hook point, replace one, unembed. Only this and `model_loading` know transformer-lens."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from sae.config import ModelConfig
from sae.errors import ModelError
from sae.model_identity import fingerprint, hash_tokenizer, hash_weights
from sae.model_loading import boot, load_pretrained
from sae.tokens import TokenPolicy

RESIDUAL_HOOKS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
INNER_HOOKS = ("attn.hook_z", "mlp.hook_post")
_HOOK = re.compile(r"blocks\.(\d+)\.(.+)")

Replacement = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ModelInfo:
    """Identity of a language model: two with equal info give equal activations.

    Attributes:
        name: as the user gave it, or the file's or folder's name where that was a path.
        revision: git commit of a hub model.
        requested_revision: the revision asked for, which may be a branch or a tag.
        fingerprint: quick hash of a local model's files.
        weights_sha256: over all weights, as loaded and before any processing.
        weight_processing: what was done to them then.
        dtype: number type of the computation.
        tokenizer_sha256: over vocabulary and special tokens.
    """

    name: str
    revision: str | None
    requested_revision: str | None
    fingerprint: str | None
    weights_sha256: str
    weight_processing: str
    dtype: str
    tokenizer_sha256: str
    d_model: int
    n_layers: int
    max_context: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class LanguageModel:
    """A causal language model whose hook points can be read and replaced.

    Args:
        config: which model, and how.
        device: where it runs.

    Raises:
        ModelError: the model cannot be found, downloaded or understood.

    Attributes:
        bridge: transformer-lens's `TransformerBridge`.
        tokenizer: the Hugging Face tokenizer.
        info: the model's identity.
    """

    def __init__(self, config: ModelConfig, device: str | torch.device = "cpu") -> None:
        model, self.tokenizer, label, revision = load_pretrained(config)
        if model.config.bos_token_id is None and self.tokenizer.bos_token_id is None:
            model.config.bos_token_id = self.tokenizer.eos_token_id
        weights_sha256 = hash_weights(model)
        self.device = torch.device(device)
        self.bridge = boot(model.to(self.device).eval(), self.tokenizer, label, config)
        cfg = self.bridge.cfg
        self.info = ModelInfo(
            name=label,
            revision=revision,
            requested_revision=config.revision,
            fingerprint=fingerprint(config.name),
            weights_sha256=weights_sha256,
            weight_processing=config.weight_processing,
            dtype=config.dtype,
            tokenizer_sha256=hash_tokenizer(self.tokenizer),
            d_model=cfg.d_model,
            n_layers=cfg.n_layers,
            max_context=cfg.n_ctx,
        )

    @property
    def bos(self) -> int | None:
        """The id that opens a context: BOS, or end-of-text for tokenizers that have no BOS."""
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return next((token for token in ids if token is not None), None)

    @property
    def separator(self) -> int | None:
        """The id that ends a document: EOS, or BOS for tokenizers that have no EOS."""
        ids = (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id)
        return next((token for token in ids if token is not None), None)

    def token_policy(self, *, prepend_bos: bool, masked_positions: int, mask_special_tokens: bool) -> TokenPolicy:
        """Which tokens count, with this tokenizer's special tokens.

        Raises:
            ModelError: BOS is asked for and the tokenizer has neither BOS nor EOS.
        """
        if prepend_bos and self.bos is None:
            raise ModelError(
                f"model {self.info.name!r}: its tokenizer has no BOS or EOS token; set data.prepend_bos=false"
            )
        ids = {*self.tokenizer.all_special_ids, *(token for token in (self.bos, self.separator) if token is not None)}
        return TokenPolicy(prepend_bos, masked_positions, tuple(sorted(ids)) if mask_special_tokens else ())

    def check_context_length(self, context_length: int) -> None:
        """Raise ModelError where the model's positions end before the context does."""
        if context_length > self.info.max_context:
            raise ModelError(
                f"data.context_length={context_length}: {self.info.name} reads at most {self.info.max_context} tokens"
            )

    def check_hook(self, hook: str) -> tuple[int, str]:
        """Block number and kind of a hook point.

        Raises:
            ModelError: not a hook point of this model; the message has the valid ones.
        """
        match = _HOOK.fullmatch(hook)
        kinds = RESIDUAL_HOOKS + INNER_HOOKS
        if match is None or match[2] not in kinds:
            near = difflib.get_close_matches(match[2] if match else hook, kinds, 1, 0.5)
            example = f"; did you mean blocks.{match[1] if match else 0}.{near[0]}?" if near else ""
            raise ModelError(f"hook {hook!r}: expected blocks.N. and one of {', '.join(kinds)}{example}")
        layer = int(match[1])
        if layer >= self.info.n_layers:
            raise ModelError(f"hook {hook!r}: {self.info.name} has blocks 0 to {self.info.n_layers - 1}")
        return layer, match[2]

    def is_residual(self, hook: str) -> bool:
        """Whether activations at `hook` live in the residual stream's space, which the unembedding reads."""
        return self.check_hook(hook)[1] in RESIDUAL_HOOKS

    @torch.no_grad()
    def activations(
        self, tokens: Int[Tensor, "context seq"], hooks: Sequence[str]
    ) -> dict[str, Float[Tensor, "context seq d_in"]]:
        """Activations at several hook points from one pass that stops at the last of them. Heads are concatenated."""
        hooks = (hooks,) if isinstance(hooks, str) else hooks
        if len(hooks) == 1 and (layer := self.entering_block(hooks[0])) is not None:
            return {hooks[0]: self.bridge(tokens, stop_at_layer=layer)}
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook_function(activation: Tensor, hook: Any) -> None:
                found[name] = rearrange(activation.detach(), "context seq ... -> context seq (...)")
                if len(found) == len(hooks):
                    raise _AllFoundError

            return hook_function

        last = max(self.check_hook(hook)[0] for hook in hooks)
        stop = last + 1 if last + 1 < self.info.n_layers else None
        with contextlib.suppress(_AllFoundError), self.bridge.hooks(fwd_hooks=[(hook, keep(hook)) for hook in hooks]):
            self.bridge(tokens, stop_at_layer=stop)
        return found

    @torch.no_grad()
    def logits(self, tokens: Int[Tensor, "context seq"]) -> Float[Tensor, "context seq vocab"]:
        """Next-token logits, float32."""
        return self.bridge(tokens).float()

    @torch.no_grad()
    def replaced_logits(
        self, tokens: Int[Tensor, "context seq"], hook: str, replacements: Sequence[Replacement]
    ) -> Iterator[Float[Tensor, "context seq vocab"]]:
        """Logits with the hook point's activations `[context, seq, d_in]` replaced, for one function after another.

        At residual-stream hooks the blocks before are computed once for all replacements.
        """
        self.check_replaceable(hook)
        layer = self.entering_block(hook)
        if layer is not None:
            resid = self.bridge(tokens, stop_at_layer=layer)
            for replacement in replacements:
                yield self.bridge(replacement(resid).to(resid.dtype), start_at_layer=layer).float()
            return
        for replacement in replacements:
            with self.replacing(hook, replacement):
                logits = self.bridge(tokens).float()
            yield logits  # outside: what the caller does in between must find the model as it is

    @contextlib.contextmanager
    def replacing(
        self, hook: str, replacement: Callable[[Tensor], Tensor] | Callable[[Tensor, Tensor | None], Tensor],
        *, with_tokens: bool = False,
    ) -> Iterator[None]:  # fmt: skip
        """While open, every forward pass of `bridge` has the hook point's activations replaced.

        Args:
            hook: hook point.
            replacement: from activations `[context, seq, d_in]` to the same shape; with `with_tokens` it also gets the
                tokens `[context, seq]`, or None in passes that begin in the middle of the model.
        """
        self.check_replaceable(hook)
        seen: list[Tensor | None] = [None]

        def remember(tokens: Tensor, hook: Any) -> None:
            seen[0] = tokens

        def replace(activation: Tensor, hook: Any) -> Tensor:
            flat = rearrange(activation, "context seq ... -> context seq (...)")
            tokens, seen[0] = seen[0], None  # a later pass that begins in the middle must not find them
            tokens = tokens if tokens is not None and tokens.shape == flat.shape[:2] else None
            new = replacement(flat, tokens) if with_tokens else replacement(flat)  # type: ignore[call-arg]
            return new.to(activation.dtype).view_as(activation)

        with self.bridge.hooks(fwd_hooks=[("embed.hook_in", remember), (hook, replace)]):
            yield

    @contextlib.contextmanager
    def reading(self, hook: str) -> Iterator[list[Tensor]]:
        """While open, the list holds the activations `[context, seq, d_in]` of the pass that came by last."""
        self.check_hook(hook)
        latest: list[Tensor] = []

        def keep(activation: Tensor, hook: Any) -> None:
            latest[:] = [rearrange(activation, "context seq ... -> context seq (...)")]

        with self.bridge.hooks(fwd_hooks=[(hook, keep)]):
            yield latest

    def unembedding(self) -> Float[Tensor, "d_model vocab"]:
        """Logit effect of a residual direction: the final norm's gain (and centring) times the unembedding.

        The final norm's division by the token's own norm is left out, so effects are right up to a positive factor.
        """
        norm = self.bridge.ln_final
        W_U = self.bridge.W_U.detach().float()
        weight = getattr(norm, "weight", None)
        if weight is not None:
            # Gemma's RMSNorm multiplies by 1 + weight.
            offset = float(getattr(norm, "uses_weight_offset", self.bridge.cfg.rmsnorm_uses_offset))
            W_U = (offset + weight.detach().float())[:, None] * W_U
        if not self.bridge.cfg.uses_rms_norm:
            W_U = W_U - W_U.mean(0, keepdim=True)
        return W_U

    def entering_block(self, hook: str) -> int | None:
        """The block whose input the hook point is, where the bridge can stop before it and start from it."""
        layer, kind = self.check_hook(hook)
        block = layer if kind == "hook_resid_pre" else layer + 1 if kind == "hook_resid_post" else None
        return block if block is not None and block < self.info.n_layers else None

    def check_replaceable(self, hook: str) -> None:
        """Raise ModelError where the hook point cannot be replaced."""
        if self.check_hook(hook)[1] == "hook_resid_mid":
            raise ModelError(
                f"hook {hook!r}: transformer-lens can read hook_resid_mid but not replace it (the skip connection "
                "would keep the original); use hook_resid_pre, hook_resid_post, hook_attn_out or hook_mlp_out"
            )


class _AllFoundError(Exception):
    """Ends a forward pass in which every hook point has been read."""
