"""Transcoders of several layers with random weights, and losses of plain transformers with forward hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.activations import ActivationCache
from sae.architectures import ReLU, TopK
from sae.config.splits import HELD_OUT, TRAIN
from sae.dictionary.base import Dictionary
from sae.dictionary.frame import Frame
from tests.support.affine_maps import ridge_by_hand

Sites = list[tuple[str, str]]
SITES: Sites = [
    ("blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out"),
    ("blocks.1.mlp.hook_post", "blocks.1.hook_mlp_out"),
    ("blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out"),
]
"""In a block, inside an MLP (of another width), and from one block to another."""


def make_transcoder(
    cache: ActivationCache, reads: str, gives: str, widths: tuple[int, int], *, skip: bool = True, seed: int = 0
) -> Dictionary:
    """Random weights; a TopK, or with an odd seed a ReLU."""
    metadata = {"hook": reads, "target_hook": gives, "model": cache.manifest.model, "tokens": cache.policy.to_json()}
    d_in, d_out = widths
    dictionary = ReLU(d_in, 40, metadata=metadata) if seed % 2 else TopK(d_in, 40, k=3, metadata=metadata)
    dictionary.set_frame(Frame(skip=skip, d_out=d_out))
    generator = torch.Generator().manual_seed(seed)
    for parameter in dictionary.requires_grad_(False).parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return dictionary


class Plain:
    """A model of transformers and its tokenizer, read from their folder; nothing here is of this package.

    Attributes:
        contexts: held-out contexts, their documents, and which positions may be replaced.
        training: the same of the training contexts.
    """

    def __init__(self, folder: Path, cache: ActivationCache) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        special = torch.tensor(AutoTokenizer.from_pretrained(folder).all_special_ids)

        def read(split: str) -> list[tuple[Tensor, Tensor, Tensor]]:
            found = []
            for batch in cache.contexts(split, batch_contexts=64):
                eligible = ~torch.isin(batch.tokens, special)
                eligible[:, : cache.policy.masked_positions] = False
                found.append((batch.tokens, batch.documents, eligible))
            return found

        self.contexts, self.training = read(HELD_OUT), read(TRAIN)

    def module(self, hook: str) -> tuple[Any, bool]:
        """The module of a hook point, and whether it is the module's input."""
        _, layer, kind = hook.split(".", 2)
        gpt2 = hasattr(self.model, "transformer")
        block = (self.model.transformer.h if gpt2 else self.model.model.layers)[int(layer)]
        if kind == "hook_resid_pre":
            return block, True
        if kind == "mlp.hook_in":
            return block.mlp, True
        if kind == "mlp.hook_post":
            return (block.mlp.c_proj if gpt2 else block.mlp.down_proj), True
        return getattr(block, "post_feedforward_layernorm", block.mlp), False

    @contextlib.contextmanager
    def hooked(self, hook: str, see: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        module, is_input = self.module(hook)

        def before(_: Any, inputs: tuple[Tensor, ...]) -> Any:
            see(inputs[0])

        def after(_: Any, __: Any, output: Tensor) -> Any:
            return see(output)

        handle = module.register_forward_pre_hook(before) if is_input else module.register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()

    def log_p(self, tokens: Tensor, sites: Sites, functions: Mapping[str, Any], eligible: Tensor) -> Tensor:
        """Log-probabilities with what `sites` give replaced, by functions of what they read."""
        seen: dict[str, Tensor] = {}

        def replacing(reads: str, gives: str) -> Callable[[Tensor], Tensor]:
            def new(y: Tensor) -> Tensor:
                return torch.where(eligible[..., None], functions[gives](seen[reads]).to(y), y)

            return new

        def keeping(reads: str) -> Callable[[Tensor], None]:
            return lambda x: seen.__setitem__(reads, x.clone())

        with torch.no_grad(), contextlib.ExitStack() as stack:
            for reads, gives in sites:
                stack.enter_context(self.hooked(reads, keeping(reads)))
                stack.enter_context(self.hooked(gives, replacing(reads, gives)))
            return self.model(tokens).logits.double().log_softmax(-1)

    def activations(self, hook: str) -> np.ndarray:
        """On all training tokens that count."""
        rows: list[Tensor] = []
        for tokens, _, eligible in self.training:
            with torch.no_grad(), self.hooked(hook, lambda x, eligible=eligible: rows.append(x[eligible].clone())):
                self.model(tokens)
        return torch.cat(rows).double().numpy()

    def stand_ins(self, dictionaries: Mapping[str, Dictionary], sites: Sites) -> dict[str, dict[str, Any]]:
        """Functions of what sites read, by kind and hook point that is given."""
        found: dict[str, dict[str, Any]] = {kind: {} for kind in ("dictionary", "skip", "linear", "mean", "zero")}
        for reads, gives in sites:
            x, y = self.activations(reads), self.activations(gives)
            d = {name: weight.double() for name, weight in dictionaries[gives].named_parameters()}
            k = getattr(dictionaries[gives], "k", None)
            weights = torch.from_numpy(ridge_by_hand(x, y))
            mean = torch.from_numpy(y.mean(0))
            found["dictionary"][gives] = lambda x, d=d, k=k: by_formula(x.double(), d, k)
            found["linear"][gives] = lambda x, weights=weights: x.double() @ weights[:-1] + weights[-1]
            found["mean"][gives] = lambda x, mean=mean: mean.expand(*x.shape[:-1], -1)
            found["zero"][gives] = lambda x, mean=mean: torch.zeros_like(mean).expand(*x.shape[:-1], -1)
            if "W_skip" in d:
                constant = mean - torch.from_numpy(x.mean(0)) @ d["W_skip"]
                found["skip"][gives] = lambda x, d=d, constant=constant: x.double() @ d["W_skip"] + constant
        return found

    def losses(self, sites: Sites, functions: Mapping[str, Any]) -> dict[str, float]:
        """Means over the positions that count: loss, clean loss, and divergence from the clean model."""
        totals, count = np.zeros(3), 0
        for tokens, _, eligible in self.contexts:
            clean = self.log_p(tokens, [], {}, eligible)
            changed = self.log_p(tokens, sites, functions, eligible)
            counts, following = eligible[:, :-1], tokens[:, 1:, None]
            ce, ce_clean = (-log_p[:, :-1].gather(-1, following)[..., 0][counts] for log_p in (changed, clean))
            kl = (clean.exp() * (clean - changed)).sum(-1)[:, :-1][counts]
            totals += [float(part.sum()) for part in (ce, ce_clean, kl)]
            count += int(counts.sum())
        return dict(zip(("ce", "ce_clean", "kl"), (totals / count).tolist(), strict=True))


def by_formula(x: Tensor, d: Mapping[str, Tensor], k: int | None) -> Tensor:
    """Frame's formula, in float64: f W_dec + b_dec + x W_skip, and nothing is subtracted from x."""
    f = (x @ d["W_enc"] + d["b_enc"]).relu()
    if k is not None:
        f = torch.where(f >= f.sort(-1).values[..., -k, None], f, 0)
    return f @ d["W_dec"] + d["b_dec"] + (x @ d["W_skip"] if "W_skip" in d else 0)
