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
from sae.model.native import NativeModel, Site, per_token
from sae.model.native_sites import MatchingSites, act_alike, residual_hooks, residual_sites
from sae.model.passes import Pass, Passes
from sae.model.unembedding import unembedding_of

NATIVE, BRIDGE = "transformers", "transformer-lens"
_CAUSAL_TOLERANCE = 1e-3
_PROBE_CONTEXTS, _PROBE_LENGTH = 2, 24


class HookedModel:
    """A transformer-lens bridge and its hook points.

    Activations are read from transformers' own modules where these have the bridge's activations, and replaced in both.
    Without a bridge, transformers' modules are all there is.

    Args:
        bridge: transformer-lens's `TransformerBridge`; None if it is not installed.
        native: the same model as transformers runs it; None if it cannot be read.
        tokenizer: the Hugging Face tokenizer.
        info: the model's identity.
        device: the model's device.
        rows: number of tokens that the model has embeddings for.
        without_bridge: why there is no bridge, as a way out.

    The arguments other than `native` and `without_bridge` are kept as attributes.
    """

    def __init__(
        self, bridge: Any, native: NativeModel | None, tokenizer: Any, info: ModelInfo, device: torch.device, rows: int,
        without_bridge: str = "pip install 'sae[lm]'",
    ) -> None:  # fmt: skip
        self._bridge, self._native = bridge, native
        self._native_sites: dict[tuple[str, bool], Site | None] = {}
        self._suspended = False  # while replacements give back what they get
        self._in_bridge_only = 0  # replacements for which `native` has no site
        self._handed_over = False  # whether `native` is a model that the caller uses, too
        self._prompt_lengths: Int[Tensor, " context"] | None = None  # while text is generated
        self.tokenizer, self.info, self.device, self.rows = tokenizer, info, device, rows
        self._without_bridge = without_bridge

    @property
    def has_bridge(self) -> bool:
        """Whether there is a bridge, without which only the residual stream and what is added to it are known."""
        return self._bridge is not None

    @property
    def bridge(self) -> Any:
        """transformer-lens's bridge.

        Raises:
            NoBridgeError: (a ModelError) transformer-lens is not installed.
        """
        if self._bridge is None:
            raise NoBridgeError(
                f"model {self.info.name!r}: this needs transformer-lens: {self._without_bridge} (without it, "
                "harvesting, training, splicing and steering work)"
            )
        return self._bridge

    @property
    def hf_model(self) -> Any:
        """The Hugging Face model, for `hf_model(tokens)` and `hf_model.generate(…)`.

        Splices and other replacements that are open act on it. It shares the weights of the model; it is transformers'
        own, or the one inside the bridge if that alone can be read or has what is replaced.
        """
        if self._native is not None and not self._in_bridge_only:
            return self._native.model
        return self.bridge.original_model

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
        """Next-token logits, with gradients unless the caller disabled them.

        They are in float32, or in float64 if the model computes in it.
        """
        if self._bridge is None:
            assert self._native is not None
            return self._native.logits(tokens)
        logits = self._bridge(tokens)
        return (logits if logits.dtype == torch.float64 else logits.float()).to(self.device)

    @contextlib.contextmanager
    def continuing(self, lengths: Int[Tensor, " context"]) -> Iterator[None]:
        """While open, tokens from these positions on are generated ones, not those of prompts."""
        self._prompt_lengths = lengths
        try:
            yield
        finally:
            self._prompt_lengths = None

    @property
    def prompt_lengths(self) -> Int[Tensor, " context"] | None:
        """The tokens of each prompt while text is generated; None otherwise."""
        return self._prompt_lengths

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
        """While open, every forward pass has the hook point's activations replaced: of `bridge` and of `hf_model`.

        Args:
            hook: hook point.
            replacement: maps activations `[context, seq, d_in]` to the same shape.
            with_pass: also give `replacement` the tokens of the pass and their positions, or None if a block is called
                by itself.
        """
        self.check_replaceable(hook)
        hook_point = self._hooks[hook]

        def new(x: Tensor, now: Pass | None) -> Tensor:
            if self._suspended:
                return x
            return replacement(x, now) if with_pass else replacement(x)  # type: ignore[call-arg]

        with contextlib.ExitStack() as stack:
            if self._bridge is not None:
                passes = stack.enter_context(Passes(self._bridge.original_model).watched())

                def replace(activation: Tensor, hook: Any) -> Tensor:
                    replaced = new(hook_point.flat(activation).to(self.device), passes.now)
                    return hook_point.unflat(replaced.to(activation.device), activation)

                stack.enter_context(self._bridge.hooks(fwd_hooks=[(hook, replace)]))
            self._enter_natively(stack, hook, new, to_replace=True)
            yield

    @contextlib.contextmanager
    def reading(self, hook: str) -> Iterator[list[Tensor]]:
        """While open, the list holds the activations `[context, seq, d_in]` of the latest pass."""
        self.check_hook(hook)
        latest: list[Tensor] = []
        hook_point = self._hooks[hook]

        def keep(activation: Tensor, hook: Any) -> None:
            latest[:] = [hook_point.flat(activation).to(self.device)]

        def keep_natively(x: Tensor, now: Pass | None) -> Tensor:
            latest[:] = [x]
            return x

        with contextlib.ExitStack() as stack:
            if self._bridge is not None:
                stack.enter_context(self._bridge.hooks(fwd_hooks=[(hook, keep)]))
            self._enter_natively(stack, hook, keep_natively, to_replace=False)
            yield latest

    def _enter_natively(
        self, stack: contextlib.ExitStack, hook: str, new: Callable[[Tensor, Pass | None], Tensor], *, to_replace: bool
    ) -> None:
        """Replace activations in transformers' modules, too; where these have none, passes are those of the bridge."""
        site = self._site(hook, to_replace=to_replace)
        if site is None:
            if self._handed_over:
                raise ModelError(
                    f"hook {hook!r}: not the input or output of a module of the model that was handed over: load the "
                    f"model by name, or use one of {', '.join(sorted(self._residual_sites)[:4])}, …"
                )
            self._in_bridge_only += 1
            stack.callback(self._leave_bridge)
            return
        assert self._native is not None
        passes = stack.enter_context(Passes(self._native.model).watched())

        def replace(x: Tensor) -> Tensor:
            now = passes.now
            flat = per_token(x, x.shape[:2] if now is None else now.positions.shape)
            assert flat is not None
            return new(flat.to(self.device), now).to(x.device, x.dtype).reshape(x.shape)

        stack.enter_context(self._native.replacing(site, replace))

    def _leave_bridge(self) -> None:
        self._in_bridge_only -= 1

    def _site(self, hook: str, *, to_replace: bool) -> Site | None:
        """The site of a hook point in transformers' modules; None if there is none, or replacing it acts differently.

        The residual stream and what is added to it are found from the blocks (see `residual_sites`). Other hook points
        are those that have the bridge's activations, and give the bridge's logits if they are to be replaced.
        """
        if self._native is None:
            return None
        if (hook, to_replace) not in self._native_sites:
            suspended, self._suspended = self._suspended, True
            try:
                self._native_sites[hook, to_replace] = self._find_site(self._native, hook, to_replace)
            finally:
                self._suspended = suspended
        return self._native_sites[hook, to_replace]

    def _find_site(self, native: NativeModel, hook: str, to_replace: bool) -> Site | None:
        site = self._residual_sites.get(hook)
        if site is not None or self._bridge is None or self._matching_sites is None:
            return site
        found = self._matching_sites.of([hook])
        if found is None:
            return None
        tokens = self.probe_tokens(_PROBE_CONTEXTS, _PROBE_LENGTH)
        same = not to_replace or act_alike(native, found[hook], self._bridge, self._hooks[hook], tokens)
        return found[hook] if same else None

    def unembedding(self) -> Float[Tensor, "d_model vocab"]:
        """Logit effect of a residual direction: the final norm's gain (and centring) times the unembedding.

        The final norm's division by the token's own norm is left out, so effects are right up to a positive factor.
        Without a final norm, this is the unembedding alone.
        """
        return unembedding_of(self.bridge, self.info.d_model, self.device)

    def check_replaceable(self, hook: str) -> None:
        """Raise ModelError if the hook point cannot be replaced."""
        self.check_hook(hook)
        if refusal := self._hooks[hook].refusal:
            raise ModelError(f"hook {hook!r}: {refusal}")


class NoBridgeError(ModelError):
    """transformer-lens, which is not installed, would be needed."""


class _AllReadError(Exception):
    """Ends a forward pass once every hook point has been read."""
