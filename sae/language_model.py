"""The language model: read a hook point, replace one, unembed. Only this and `model_loading` know transformer-lens."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae import hook_points
from sae.bridging import boot
from sae.config import ModelConfig
from sae.errors import ConfigError, ModelError
from sae.hook_probe import Hook, probe_tokens, read_hooks
from sae.hub_errors import first_line
from sae.model_identity import fingerprint, hash_config, hash_ids, hash_tokenizer, hash_weights
from sae.model_loading import code_sha256, load_pretrained
from sae.modes import in_own_modes
from sae.passes import Pass, Passes
from sae.tail import NO_ROAD, Replacement, Road, Tail, without_inexact
from sae.tokens import TokenPolicy


@dataclass(frozen=True)
class ModelInfo:
    """Identity of a language model: two whose entries are equal, but for the names, give equal activations.

    Attributes:
        name: as the user gave it, or the file's or folder's name where that was a path.
        revision: git commit of a hub model.
        requested_revision: the revision asked for, which may be a branch or a tag.
        fingerprint: quick hash of a local model's files.
        weights_sha256: over all weights, as loaded and before any processing.
        weight_processing: what was done to them then.
        dtype: number type of the computation.
        tokenizer_sha256: over vocabulary and special tokens.
        trust_remote_code: whether code that comes with the model was allowed to run.
        code_sha256: over the code of its own that it was made of; None: the libraries' classes alone.
        config_sha256: over what its configuration says of the computation.
        tokenizer_ids_sha256: over the ids that the tokenizer gives for a text.
        library: what made the model of configuration and weights, and its version.
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
    trust_remote_code: bool = False
    code_sha256: str | None = None
    config_sha256: str | None = None
    tokenizer_ids_sha256: str | None = None
    library: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class LanguageModel:
    """A causal language model whose hook points can be read and replaced.

    Args:
        config: which model, and how; or just its name: a hub model, a folder, a .gguf file, or `demo`.
        device: where it runs.

    Raises:
        ConfigError: `config` is neither.
        ModelError: the model cannot be found, downloaded or understood.

    Attributes:
        bridge: transformer-lens's `TransformerBridge`.
        tokenizer: the Hugging Face tokenizer.
        info: the model's identity.
    """

    @in_own_modes
    def __init__(self, config: ModelConfig | str | Path, device: str | torch.device = "cpu") -> None:
        config = _configured(config)
        model, self.tokenizer, label, revision, self._made_up = load_pretrained(config)
        if model.config.bos_token_id is None and self.tokenizer.bos_token_id is None:
            model.config.bos_token_id = self.tokenizer.eos_token_id
        weights_sha256, code = hash_weights(model), code_sha256(model, model.config, self.tokenizer)
        self.device = torch.device(device)
        self.bridge = boot(model.to(self.device).eval(), copy.deepcopy(self.tokenizer), label, config)
        self._tails: dict[str, Tail] = {}
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
            trust_remote_code=config.trust_remote_code,
            code_sha256=code,
            config_sha256=hash_config(model.config),
            tokenizer_ids_sha256=hash_ids(self.tokenizer),
            library=f"transformers {version('transformers')}",
        )

    @property
    def bos(self) -> int | None:
        """The id that opens a context: BOS, or end-of-text for tokenizers that have no BOS."""
        return self._first_known(self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)

    @property
    def separator(self) -> int | None:
        """The id that ends a document: EOS, or BOS for tokenizers that have no EOS.

        Without either nothing stands between documents. A context may then hold the end of one and the beginning of
        the next without a sign of it, the token policy masks first positions of contexts and no ids, and the first
        token of a document counts like any other.
        """
        return self._first_known(self.tokenizer.eos_token_id, self.tokenizer.bos_token_id)

    def _first_known(self, *ids: int | None) -> int | None:
        """The first id that a file of the tokenizer holds; what its class makes up, the model has never seen."""
        return next((token for token in ids if token is not None and token not in self._made_up), None)

    def token_policy(self, *, prepend_bos: bool, masked_positions: int, mask_special_tokens: bool) -> TokenPolicy:
        """Which tokens count, with this tokenizer's special tokens.

        Raises:
            ModelError: BOS is asked for and the tokenizer's files have neither BOS nor EOS, or the model has no row
                for one.
        """
        if prepend_bos and self.bos is None:
            made_up = ", ".join(repr(self.tokenizer.convert_ids_to_tokens(token)) for token in sorted(self._made_up))
            but = f" in its files ({made_up} made up by its class or settings)" if made_up else ""
            raise ModelError(
                f"model {self.info.name!r}: its tokenizer has no BOS or EOS token{but}; set data.prepend_bos=false"
            )
        for token in (self.bos if prepend_bos else None, self.separator):
            if token is not None and token >= self.rows:
                raise ModelError(
                    f"model {self.info.name!r}: its tokenizer's BOS or EOS token has the id {token}, and the model has "
                    f"embeddings of {self.rows} tokens; load the tokenizer that the model was trained with"
                )
        ids = {*self.tokenizer.all_special_ids, *(token for token in (self.bos, self.separator) if token is not None)}
        return TokenPolicy(prepend_bos, masked_positions, tuple(sorted(ids)) if mask_special_tokens else ())

    def check_context_length(self, context_length: int) -> None:
        """Raise ModelError where the model's positions end before the context does."""
        if context_length > self.info.max_context:
            raise ModelError(
                f"data.context_length={context_length}: {self.info.name} reads at most {self.info.max_context} tokens"
            )

    def hooks(self) -> list[Hook]:
        """Every hook point that the model has, with its width and whether it can be replaced, block by block.

        None of those that can be replaced changes the logits when its own activations take their own place.
        """
        return list(self._checked_hooks.values())

    @functools.cached_property
    def _checked_hooks(self) -> dict[str, Hook]:
        return without_inexact(self, self._hooks)

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
        """Ids that the model has rows for and the tokenizer names."""
        return max(1, min(self.rows, len(self.tokenizer)))

    @property
    def rows(self) -> int:
        """Tokens that the model has embeddings of."""
        return int(self.bridge.original_model.get_input_embeddings().weight.shape[0])

    def check_id(self, token: int) -> None:
        """Raise ModelError if the model has no embedding of a token."""
        if token >= self.rows:
            raise ModelError(
                f"model {self.info.name!r}: its tokenizer gives the token "
                f"{self.tokenizer.convert_ids_to_tokens(token)!r} with the id {token:,}, and the model has embeddings "
                f"of {self.rows:,} tokens; load the tokenizer that the model was trained with"
            )

    def probe_tokens(self, contexts: int, length: int) -> Int[Tensor, "context seq"]:
        """Valid token ids without a meaning, to try the model on."""
        return probe_tokens(self._vocabulary, contexts, min(length, self.info.max_context), self.device)

    def check_hook(self, hook: str) -> tuple[int, str]:
        """Block number and kind of a hook point.

        Raises:
            ModelError: not a hook point of this model; the message has the valid ones.
        """
        parts = hook_points.split(hook)
        if parts is None:
            raise ModelError(hook_points.no_hook_point(hook))
        block, kind = parts
        if block >= self.info.n_layers:
            raise ModelError(f"hook {hook!r}: {self.info.name} has blocks 0 to {self.info.n_layers - 1}")
        if hook not in self._hooks:
            there = [other.kind for other in self._hooks.values() if other.block == block]
            raise ModelError(
                f"hook {hook!r}: block {block} of {self.info.name} has no {kind}; it has {', '.join(there)}"
                + hook_points.nearest(kind, there, block)
            )
        return block, kind

    def is_residual(self, hook: str) -> bool:
        """Whether activations at `hook` live in the residual stream's space, which the unembedding reads."""
        return self.check_hook(hook)[1] in hook_points.RESIDUAL

    @torch.no_grad()
    def activations(
        self, tokens: Int[Tensor, "context seq"], hooks: Sequence[str]
    ) -> dict[str, Float[Tensor, "context seq d_in"]]:
        """Activations at several hook points from one pass that stops at the last of them. Heads are concatenated."""
        hooks = (hooks,) if isinstance(hooks, str) else hooks
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook_function(activation: Tensor, hook: Any) -> None:
                found[name] = self._hooks[name].flat(activation.detach())
                if len(found) == len(hooks):
                    raise _AllFoundError

            return hook_function

        for hook in hooks:
            self.check_hook(hook)
        with contextlib.suppress(_AllFoundError), self.bridge.hooks(fwd_hooks=[(hook, keep(hook)) for hook in hooks]):
            self.bridge(tokens)
        return found

    def to_tokens(self, text: str | Sequence[str], *, prepend_bos: bool = True) -> Int[Tensor, "context seq"]:
        """Token ids of one text, or of several that have as many tokens, on the model's device.

        Args:
            text: a text or texts.
            prepend_bos: begin with `bos`, where the tokenizer has one.

        Raises:
            ModelError: no text, one without a token, or texts of different lengths: padding would change what the
                model sees.
        """
        texts = [text] if isinstance(text, str) else list(text)
        start = [self.bos] if prepend_bos and self.bos is not None else []
        rows = [[*start, *self.tokenizer(one, add_special_tokens=False)["input_ids"]] for one in texts]
        least, most = min(map(len, rows), default=0), max(map(len, rows), default=0)
        if not least:
            raise ModelError("there is no text, or one has no token: leave empty texts out")
        if least < most:
            raise ModelError(f"the texts have {least} to {most} tokens: give those of one length together")
        return torch.tensor(rows, device=self.device)

    def logits(self, tokens: Int[Tensor, "context seq"]) -> Float[Tensor, "context seq vocab"]:
        """Next-token logits, float32, with gradients unless the caller has turned them off."""
        return self.bridge(tokens).float()

    def check_causal(self) -> None:
        """Raise ModelError if logits depend on later tokens, as those of masked language models do."""
        if self._looks_ahead > _CAUSAL_TOLERANCE:
            raise ModelError(
                f"{self.info.name} is no causal language model: its logits change by {self._looks_ahead:.2g} of the "
                "largest if a later token is another one, so that it has no next-token loss"
            )

    @functools.cached_property
    @torch.no_grad()
    def _looks_ahead(self) -> float:
        """How far logits change if the last token does, as a share of the largest."""
        tokens = self.probe_tokens(2, 16)
        changed = tokens.clone()
        changed[:, -1] = (tokens[:, -1] + 1) % self._vocabulary
        before, after = (self.logits(x)[:, :-1].nan_to_num() for x in (tokens, changed))
        return float((after - before).abs().max() / before.abs().max().clamp_min(1e-30))

    def tail(self, hook: str) -> Tail:
        """The model from a hook point on, proved on this model when it is first asked for.

        Raises:
            ModelError: the hook point cannot be replaced, or not exactly.
        """
        if hook not in self._tails:
            self._tails[hook] = Tail(self, hook)
        return self._tails[hook]

    def road(self, hook: str) -> Road:
        """How replacements at a hook point become logits; `none`, with the reason, where it can be read only.

        Raises:
            ModelError: the model has no such hook point.
        """
        self.check_hook(hook)
        try:
            return self.tail(hook).road
        except ModelError as error:
            return Road(NO_ROAD, str(error))

    @torch.no_grad()
    def replaced_logits(
        self, tokens: Int[Tensor, "context seq"], hook: str, replacements: Sequence[Replacement]
    ) -> Iterator[Float[Tensor, "context seq vocab"]]:
        """Logits with the hook point's activations `[context, seq, d_in]` replaced, for one function after another.

        The blocks before the hook point are computed once for all replacements, if that is exact: see `tail`.
        """
        tail = self.tail(hook)
        start = tail.start(tokens)
        for replacement in replacements:
            yield tail.logits(start, replacement)

    @contextlib.contextmanager
    def replacing(
        self, hook: str, replacement: Callable[[Tensor], Tensor] | Callable[[Tensor, Pass | None], Tensor],
        *, with_pass: bool = False,
    ) -> Iterator[None]:  # fmt: skip
        """While open, every forward pass of `bridge` has the hook point's activations replaced.

        Args:
            hook: hook point.
            replacement: from activations `[context, seq, d_in]` to the same shape; with `with_pass` it also gets the
                tokens of the pass and their positions, or None if a block is called by itself.
        """
        self.check_replaceable(hook)
        place, passes = self._hooks[hook], Passes(self.bridge.original_model)

        def replace(activation: Tensor, hook: Any) -> Tensor:
            flat = place.flat(activation)
            new = replacement(flat, passes.now) if with_pass else replacement(flat)  # type: ignore[call-arg]
            return place.unflat(new, activation)

        with passes.watched(), self.bridge.hooks(fwd_hooks=[(hook, replace)]):
            yield

    @contextlib.contextmanager
    def reading(self, hook: str) -> Iterator[list[Tensor]]:
        """While open, the list holds the activations `[context, seq, d_in]` of the pass that came by last."""
        self.check_hook(hook)
        latest: list[Tensor] = []
        place = self._hooks[hook]

        def keep(activation: Tensor, hook: Any) -> None:
            latest[:] = [place.flat(activation)]

        with self.bridge.hooks(fwd_hooks=[(hook, keep)]):
            yield latest

    def unembedding(self) -> Float[Tensor, "d_model vocab"]:
        """Logit effect of a residual direction: the final norm's gain (and centring) times the unembedding.

        The final norm's division by the token's own norm is left out, so effects are right up to a positive factor. A
        model without a final norm has the unembedding alone.
        """
        norm = getattr(self.bridge, "ln_final", None)
        W_U = self.bridge.W_U.detach().float()
        if W_U.shape[0] != self.info.d_model:  # embeddings of another width than the residual stream, as OPT-350M has
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
        """Raise ModelError where the hook point cannot be replaced."""
        self.check_hook(hook)
        refusal = self._hooks[hook].refusal
        if refusal is not None:
            raise ModelError(f"hook {hook!r}: {refusal}")


_CAUSAL_TOLERANCE = 1e-3


class _AllFoundError(Exception):
    """Ends a forward pass in which every hook point has been read."""


def _configured(model: Any) -> ModelConfig:
    """The configuration of a model that is given by its name.

    Raises:
        ConfigError: it is neither a name nor a configuration.
    """
    if isinstance(model, str | Path):
        return ModelConfig(name=str(model))
    if isinstance(model, ModelConfig):
        return model
    raise ConfigError(
        f"language model {model!r}: expected a name such as 'gpt2', or a sae.ModelConfig; it is a "
        f"{type(model).__name__}"
    )
