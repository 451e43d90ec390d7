"""From activations at a hook point to next-token logits, along a road that is checked on the model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae.errors import ModelError
from sae.model.hook_probe import Hook, perturbed
from sae.model.hooked import HookedModel

SHORT, WHOLE, NO_ROAD = "short", "whole", "none"
_TOLERANCE = 1e-3
_CONTEXTS, _LENGTH = 2, 24

Replacement = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Road:
    """How replacements at a hook point become logits.

    Attributes:
        name: `short`: the blocks before the hook point run once for all replacements, the others once for each;
            `whole`: the whole model runs for each; `none`: the hook point can only be read, so there are no losses.
        reason: why the road is not short; None if it is.
    """

    name: str
    reason: str | None = None

    def __str__(self) -> str:
        if self.name == SHORT:
            return "the blocks before the hook point ran once for all replacements, the others once for each"
        if self.name == NO_ROAD:
            return f"losses of the language model are left out ({self.reason})"
        return f"the whole model ran for each replacement ({self.reason})"


@dataclass(frozen=True)
class Start:
    """Contexts, and the output of the blocks before a hook point for them.

    Attributes:
        tokens: the contexts.
        output: output of the last block that does not run again; None if all blocks do.
    """

    tokens: Int[Tensor, "context seq"]
    output: Any = None

    @property
    def hidden(self) -> Float[Tensor, "context seq d_model"]:
        """The residual stream in `output`."""
        return self.output[0] if isinstance(self.output, tuple | list) else self.output

    def with_hidden(self, hidden: Tensor) -> Start:
        """The same with another residual stream."""
        others = self.output[1:] if isinstance(self.output, tuple | list) else None
        return Start(self.tokens, hidden if others is None else (hidden, *others))

    def at(self, context: Int[Tensor, " n"], length: int) -> Start:
        """Contexts selected by index (an index may repeat), cut to a length."""
        tokens = self.tokens[context, :length]
        if not isinstance(self.output, tuple | list):
            return Start(tokens, None if self.output is None else self.output[context, :length])
        others = (other[context] if isinstance(other, Tensor) else other for other in self.output[1:])
        return Start(tokens, (self.hidden[context, :length], *others))


@dataclass(frozen=True)
class Readout:
    """The end of the model at some positions.

    Attributes:
        final: the residual stream that enters the final norm, float32.
        logits: next-token logits, float32.
    """

    final: Float[Tensor, "context n d_model"]
    logits: Float[Tensor, "context n vocab"]


class Tail:
    """The part of a language model after a hook point.

    The output of the earlier blocks is recorded once; in every later pass, stand-ins return that record instead. Before
    a tail is used, it is checked on the model with a few tokens. Putting back the hook point's own activations gives
    the model's own logits: to the last bit in float32 on a CPU, elsewhere to 1e-3 of the largest logit. Other
    activations change the logits, and change them equally on the short road and on the whole one.

    Args:
        language_model: the model; its weights and hooks are left unchanged.
        hook: hook point.

    Raises:
        ModelError: the model has no such hook point, it cannot be replaced, or putting back its own activations does
            not give the model's own logits.

    Attributes:
        road: the road that is used.
    """

    def __init__(self, language_model: HookedModel, hook: str) -> None:
        language_model.check_replaceable(hook)
        self.language_model, self.hook = language_model, hook
        self._blocks = language_model.bridge.blocks
        block, kind = language_model.check_hook(hook)
        self._leaves_block = kind == "hook_resid_post"
        self._before = block + self._leaves_block
        self.road = self._choose_road()

    @torch.no_grad()
    def start(self, tokens: Int[Tensor, "context seq"]) -> Start:
        """Run the blocks before the hook point if the road is short."""
        return self._record(tokens) if self.road.name == SHORT and self._before else Start(tokens)

    @torch.no_grad()
    def activations(self, start: Start) -> Float[Tensor, "context seq d_in"]:
        """The model's own activations at the hook point."""
        if start.output is not None and self._leaves_block:
            return start.hidden
        with self._without_earlier_blocks(start):
            return self.language_model.bridge_activations(start.tokens, [self.hook])[self.hook]

    @torch.no_grad()
    def logits(self, start: Start, replacement: Replacement) -> Float[Tensor, "context seq vocab"]:
        """Next-token logits, float32, with the hook point's activations `[context, seq, d_in]` replaced."""
        with self.replacing(start, replacement):
            return self.language_model.logits(start.tokens)

    @torch.no_grad()
    def check_clean(self, tokens: Int[Tensor, "context seq"], logits: Float[Tensor, "context seq vocab"]) -> None:
        """Raise ModelError unless these logits, from a replacement that changes nothing, are the model's own."""
        self._check_same(logits, self.language_model.logits(tokens))

    @torch.no_grad()
    def read_out(
        self, start: Start, x: Float[Tensor, "context seq d_in"], positions: Int[Tensor, "context n"]
    ) -> Readout:
        """Run the rest of the model on activations `x`; only the requested positions are unembedded.

        Args:
            start: the contexts.
            x: activations of every token at the hook point.
            positions: positions in each context at which the model is read out.
        """
        bridge, final = self.language_model.bridge, []

        def keep(residual: Tensor, hook: Any) -> None:
            final.append(_at(residual, positions))

        def select(residual: Tensor, hook: Any) -> Tensor:
            if not final:  # a model without a final norm
                final.append(_at(residual, positions))
            return _at(residual, positions)

        norm = [("ln_final.hook_in", keep)] if "ln_final.hook_in" in bridge.hook_dict else []
        with bridge.hooks(fwd_hooks=[*norm, ("unembed.hook_in", select)]), self.replacing(start, lambda _: x):
            logits = bridge(start.tokens)
        device = self.language_model.device
        return Readout(final[0].float().to(device), logits.float().to(device))

    def _record(self, tokens: Int[Tensor, "context seq"]) -> Start:
        """Run the model up to its last block before the hook point.

        Raises:
            _NoShortRoadError: blocks pass on more than one residual stream.
        """
        outputs: list[Any] = []

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            outputs.append(output)
            raise _RecordedError

        last = self._blocks[self._before - 1]
        with last.register_forward_hook(keep), contextlib.suppress(_RecordedError):
            self.language_model.bridge(tokens)
        start = Start(tokens, _on(self.language_model.device, outputs[0]))
        if not isinstance(start.hidden, Tensor) or start.hidden.shape[:2] != tokens.shape:
            raise _NoShortRoadError("its blocks pass on more than one residual stream")
        return start

    @contextlib.contextmanager
    def replacing(self, start: Start, replacement: Replacement) -> Iterator[None]:
        """While open, passes over the start's tokens have the hook point's activations replaced, with their gradients.

        Args:
            start: the contexts.
            replacement: maps activations `[context, seq, d_in]` to the same shape.
        """
        if start.output is not None and self._leaves_block:
            new = replacement(start.hidden).to(start.hidden.dtype)
            with self._without_earlier_blocks(start.with_hidden(new)):
                yield
        else:
            with self.language_model.replacing(self.hook, replacement), self._without_earlier_blocks(start):
                yield

    @contextlib.contextmanager
    def _without_earlier_blocks(self, start: Start) -> Iterator[None]:
        """While open, the blocks whose output was recorded are removed from the model, and the record replaces it."""
        modules = self._blocks._modules
        recorded = 0 if start.output is None else self._before
        blocks = {name: modules[name] for name in map(str, range(recorded))}
        try:
            modules.update({name: _StandIn(block, start) for name, block in blocks.items()})
            yield
        finally:
            modules.update(blocks)

    @torch.no_grad()
    def _choose_road(self) -> Road:
        """The shortest exact road; see the class."""
        model, name = self.language_model, self.language_model.info.name
        tokens = model.probe_tokens(_CONTEXTS, _LENGTH)
        own, start = model.logits(tokens), Start(tokens)
        model.check_causal()
        same, other = (self.logits(start, replacement) for replacement in (torch.clone, perturbed))
        self._check_same(same, own)
        if own.isfinite().all() and torch.equal(other, own):
            raise ModelError(
                f"hook {self.hook!r}: replacing its activations leaves the logits of {name} unchanged; use another "
                f"hook point ('sae hooks {name}' lists them)"
            )
        if not self._before:
            return Road(SHORT)
        try:
            start = self._record(tokens)
            model.logits(tokens.flip(1))  # state that blocks keep outside their outputs is then of other tokens
            pairs = ((self.logits(start, torch.clone), own), (self.logits(start, perturbed), other))
        except _NoShortRoadError as error:
            return Road(WHOLE, str(error))
        except Exception as error:
            return Road(WHOLE, f"{type(error).__name__} on the short one")
        for short, whole in pairs:
            if not same_logits(model, short, whole):
                return Road(WHOLE, f"the short one is off by {_difference(short, whole):.2g} of the largest logit")
        return Road(SHORT)

    def _check_same(self, logits: Tensor, own: Tensor) -> None:
        name = self.language_model.info.name
        if not same_logits(self.language_model, logits, own):
            raise ModelError(
                f"hook {self.hook!r}: putting back its own activations changes the logits of {name} by up to "
                f"{_difference(logits, own):.2g} of the largest, so measurements there would be of another model; use "
                f"another hook point ('sae hooks {name}' lists them)"
            )


def same_logits(language_model: HookedModel, logits: Tensor, expected: Tensor) -> bool:
    """Whether logits are equal: to the last bit in float32 on a CPU, elsewhere to 1e-3 of the largest."""
    if language_model.device.type == "cpu" and language_model.info.dtype == "float32":
        return torch.equal(logits.nan_to_num(), expected.nan_to_num())
    return _difference(logits, expected) <= _TOLERANCE


@torch.no_grad()
def without_inexact(language_model: HookedModel, hooks: dict[str, Hook]) -> dict[str, Hook]:
    """The same hook points, with a refusal for those where putting back the own activations changes the logits.

    All are tried in one pass; one by one only if that pass changes the logits.
    """
    tokens = language_model.probe_tokens(_CONTEXTS, _LENGTH)
    own = language_model.logits(tokens)
    replaceable = [name for name, hook in hooks.items() if hook.refusal is None]

    def difference(names: list[str]) -> float:
        with language_model.bridge.hooks(
            fwd_hooks=[(name, lambda activation, hook: activation.clone()) for name in names]
        ):
            logits = language_model.logits(tokens)
        return 0.0 if same_logits(language_model, logits, own) else _difference(logits, own)

    if not difference(replaceable):
        return hooks
    shares = {name: share for name in replaceable if (share := difference([name]))}
    refusals = {
        name: f"putting back its own activations changes the logits by {share:.2g}" for name, share in shares.items()
    }
    return {name: dataclasses.replace(hook, refusal=refusals.get(name, hook.refusal)) for name, hook in hooks.items()}


class _StandIn(nn.Module):
    """Replaces a block: returns the recorded output, and has the block's attributes."""

    def __init__(self, block: nn.Module, start: Start) -> None:
        super().__init__()
        self.__dict__["_block"] = block  # bypasses nn.Module, which would register it as a submodule
        self._start = start

    def forward(self, *_: Any, **__: Any) -> Any:
        """A copy of the output, since models may write into it."""
        return self._start.with_hidden(self._start.hidden.clone()).output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)


class _RecordedError(Exception):
    """Ends a forward pass once its first blocks have been recorded."""


class _NoShortRoadError(Exception):
    """The blocks before a hook point cannot be skipped."""


def _difference(logits: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest logit."""
    logits, expected = logits.nan_to_num(), expected.nan_to_num()
    return float((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def _on(device: torch.device, output: Any) -> Any:
    """A block's output on a device."""
    if type(output) in (tuple, list):
        return type(output)(_on(device, part) for part in output)
    return output.to(device) if isinstance(output, Tensor) else output


def _at(x: Float[Tensor, "context seq d"], positions: Int[Tensor, "context n"]) -> Float[Tensor, "context n d"]:
    return x.gather(1, positions.to(x.device)[..., None].expand(-1, -1, x.shape[-1]))
