"""Text that a language model generates: prompts of several lengths together, with a key-value cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from sae.errors import ConfigError, ModelError
from sae.model.guard import quiet, replaced
from sae.model.hooked import HookedModel
from sae.numerics.modes import in_own_modes
from sae.numerics.seeding import global_stream

_PURPOSE = "generate: next tokens"


class Generated(NamedTuple):
    """The continuation of a prompt.

    Attributes:
        tokens: its ids, without those of the prompt and the end of text.
        text: its text.
    """

    tokens: list[int]
    text: str


def padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device, *, left: bool
) -> tuple[Int[Tensor, "context seq"], Int[Tensor, "context seq"]]:
    """Rows of ids as one tensor, and a mask that is 0 on padding.

    Args:
        rows: ids, in rows of any length.
        pad: the id that fills up.
        device: of the tensors.
        left: pad before the text instead of after it.
    """
    longest = max(map(len, rows))
    tokens, mask = (torch.full((len(rows), longest), value, device=device) for value in (pad, 0))
    for place, row in enumerate(rows):
        start = longest - len(row) if left else 0
        tokens[place, start : start + len(row)] = torch.tensor(row, device=device)
        mask[place, start : start + len(row)] = 1
    return tokens, mask


@in_own_modes
@torch.no_grad()
def continuations(
    model: HookedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int | None, temperature: float,
    *, stop: bool,
) -> list[list[int]]:  # fmt: skip
    """Ids that follow each prompt, without the end of text; see `LanguageModel.generate`.

    The settings of generation that come with a model (penalties, top-k) are not used: the most probable token follows,
    or one that is sampled from the whole distribution.
    """
    _check(max_new_tokens, temperature)
    longest, most = max(map(len, prompts)) + max_new_tokens, model.info.max_context
    if longest > most:
        raise ModelError(
            f"the longest prompt and {max_new_tokens:,} new tokens are {longest:,} tokens together: {model.info.name} "
            f"reads at most {most:,}; shorten the prompt, or set max_new_tokens"
        )
    hf = model.hf_model
    ends = _ends(model, hf)
    pad = ends[0] if ends else 0
    tokens, mask = padded(prompts, pad, model.device, left=True)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    with (
        _settings(hf, max_new_tokens, seed, temperature, ends if stop else [], pad),
        _seeded(seed, model.device),
        model.continuing(lengths),
    ):
        whole = hf.generate(tokens, attention_mask=mask)
    return [_until(made, ends if stop else []) for made in whole[:, tokens.shape[1] :].tolist()]


def _until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens before the first one that ends a text."""
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]


def _check(max_new_tokens: int, temperature: float) -> None:
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens}: expected at least 1")
    if not temperature > 0:
        raise ConfigError(f"temperature={temperature}: expected more than 0; without a seed, generation is greedy")


def _ends(model: HookedModel, hf: Any) -> list[int]:
    """Ids that end a text, by the model's settings or its tokenizer."""
    configured = getattr(getattr(hf, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return [token for token in dict.fromkeys([*ids, model.tokenizer.eos_token_id]) if token is not None]


@contextlib.contextmanager
def _settings(
    hf: Any, max_new_tokens: int, seed: int | None, temperature: float, ends: list[int], pad: int
) -> Iterator[None]:
    """While open, a model generates by these settings and no others."""
    from transformers import GenerationConfig

    sampling = {} if seed is None else {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=seed is not None, use_cache=True, eos_token_id=ends or None,
        pad_token_id=pad, **sampling,
    )  # fmt: skip
    with quiet(), replaced(hf, "generation_config", settings):
        yield


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """While open, PyTorch's own generators, which transformers samples with, are at the start of a stream."""
    if seed is None:
        yield
        return
    with global_stream(device, _PURPOSE, seed):
        yield
