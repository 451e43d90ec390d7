"""The cache's eligible tokens in blocks of one size, so that no result depends on how the cache is read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.activations.cache import ActivationCache, dequantise
from sae.config.progress import Progress, silent
from sae.config.settings import EvaluationConfig
from sae.config.splits import HELD_OUT, TRAIN
from sae.errors import CacheError, ConfigError
from sae.evaluation.partial import Unfinished
from sae.model.language_model import LanguageModel

BLOCK_TOKENS = 2048
NORM_DECADES, BINS_PER_DECADE = (-4, 8), 50


@dataclass(frozen=True)
class Block:
    """Eligible tokens: their activations, document indices, and activations at other hook points."""

    x: Float[Tensor, "rows d_in"]
    documents: Int[Tensor, " rows"]
    others: dict[str, Float[Tensor, "rows _"]] = field(default_factory=dict)


@dataclass(frozen=True)
class NormHistogram:
    """Numbers of tokens by ‖x‖, eligible and masked ones separately.

    Attributes:
        edges: of the bins, log10 ‖x‖, ascending; norms beyond the ends count in the end bins.
    """

    edges: Float[Tensor, " edges"]
    eligible: Int[Tensor, " bins"]
    masked: Int[Tensor, " bins"]

    def to_json(self) -> dict[str, Any]:
        """The histogram without empty bins at the ends."""
        filled = (self.eligible + self.masked).nonzero().flatten()
        first, last = int(filled[0]), int(filled[-1]) + 1
        return {
            "log10_edges": [round(edge, 6) for edge in self.edges[first : last + 1].tolist()],
            "eligible": self.eligible[first:last].tolist(),
            "masked": self.masked[first:last].tolist(),
        }


@dataclass(frozen=True)
class ActivationSummary:
    """Results of one pass over the held-out activations, before anything is reconstructed.

    Attributes:
        tokens: number of eligible tokens, which are those evaluated.
        masked: number of other tokens read, which the policy leaves out.
        documents: number of documents with an eligible token.
        all_documents: number of documents in the split.
        mean: x̄, over the eligible tokens, float64.
        norms: ‖x‖ of both kinds of token.
    """

    tokens: int
    masked: int
    documents: int
    all_documents: int
    mean: Float[Tensor, " d_in"]
    norms: NormHistogram


@dataclass(frozen=True)
class HeldOut:
    """A cache's held-out tokens at a hook point, and everything else that all parts of an evaluation share.

    Attributes:
        cache: holds them; baselines are fitted on its training tokens.
        hook: hook point.
        settings: how many tokens, with a number in place of each `auto`.
        language_model: the model that the cache was made with; None: no losses.
        device: where reconstructions are computed; the language model stays where it is.
        progress: called with the progress of each stage.
        unfinished: sums that an interrupted evaluation left, and those of this one.
    """

    cache: ActivationCache
    hook: str
    settings: EvaluationConfig = field(default_factory=EvaluationConfig)
    language_model: LanguageModel | None = None
    device: str | torch.device = "cpu"
    progress: Progress = silent
    unfinished: Unfinished = field(default_factory=Unfinished)


def summarise(held_out: HeldOut) -> ActivationSummary:
    """Count the held-out tokens that are evaluated, average their activations, and collect norms.

    Raises:
        CacheError: an eligible activation is not finite.
        ConfigError: no token is left to evaluate.
    """
    cache, hook, settings = held_out.cache, held_out.hook, held_out.settings
    edges = torch.linspace(*NORM_DECADES, (NORM_DECADES[1] - NORM_DECADES[0]) * BINS_PER_DECADE + 1)
    histograms = torch.zeros(2, len(edges) - 1, dtype=torch.long)
    names = cache.documents(HELD_OUT)
    seen = torch.zeros(len(names), dtype=torch.bool)
    total = torch.zeros(cache.d_in(hook), dtype=torch.float64)
    tokens = rows = 0
    all_rows = min(cache.rows(HELD_OUT), settings.tokens or cache.rows(HELD_OUT))
    held_out.progress("activations", 0, all_rows)
    for batch in cache.contexts(HELD_OUT, hook, batch_contexts=settings.batch_contexts, max_tokens=settings.tokens):
        assert batch.activations is not None
        x = batch.activations[batch.eligible]
        check_finite(x, cache, hook)
        norms = batch.activations.nan_to_num().double().norm(dim=-1)
        bins = torch.bucketize(norms.clamp_min(1e-30).log10(), edges.double(), right=True).sub_(1)
        for which, chosen in enumerate((batch.eligible, ~batch.eligible)):
            histograms[which] += torch.bincount(bins[chosen].clamp(0, len(edges) - 2), minlength=len(edges) - 1)
        total += x.double().sum(0)
        seen[batch.documents[batch.eligible]] = True
        tokens, rows = tokens + len(x), rows + batch.tokens.numel()
        held_out.progress("activations", rows, all_rows)
    if tokens == 0:
        raise ConfigError(_nothing_left(cache, settings, rows))
    norms = NormHistogram(edges, histograms[0], histograms[1])
    return ActivationSummary(tokens, rows - tokens, int(seen.sum()), len(names), total / tokens, norms)


def held_out_blocks(held_out: HeldOut, others: Collection[str] = ()) -> Iterator[Block]:
    """Eligible held-out tokens in text order, in blocks of one size whatever `batch_contexts`; the last is shorter.

    Raises:
        CacheError: an eligible activation at one of the other hook points is not finite.
    """
    pending: list[tuple[Tensor, ...]] = []
    count = 0
    for x, documents, *rest in _eligible_rows(held_out, others):
        pending.append((x, documents, *rest))
        count += len(documents)
        if count >= BLOCK_TOKENS:
            columns = [torch.cat(parts).split(BLOCK_TOKENS) for parts in zip(*pending, strict=True)]
            blocks = list(zip(*columns, strict=True))
            full_blocks = count // BLOCK_TOKENS
            yield from (_block(block, others) for block in blocks[:full_blocks])
            pending, count = blocks[full_blocks:], count % BLOCK_TOKENS
    if count:
        yield _block([torch.cat(parts) for parts in zip(*pending, strict=True)], others)


def _eligible_rows(held_out: HeldOut, others: Collection[str]) -> Iterator[tuple[Tensor, ...]]:
    """Activations, documents, and activations at the other hook points, of each batch's eligible tokens."""
    cache, hook, settings = held_out.cache, held_out.hook, held_out.settings
    streams = [
        cache.contexts(HELD_OUT, name, batch_contexts=settings.batch_contexts, max_tokens=settings.tokens)
        for name in (hook, *others)
    ]
    for first, *rest in zip(*streams, strict=True):
        activations = []
        for name, batch in zip((hook, *others), (first, *rest), strict=True):
            assert batch.activations is not None
            activations.append(batch.activations[batch.eligible])
            if name != hook:
                check_finite(activations[-1], cache, name)
        yield activations[0], first.documents[first.eligible], *activations[1:]


def _block(columns: Sequence[Tensor], others: Collection[str]) -> Block:
    x, documents, *rest = columns
    return Block(x, documents, dict(zip(others, rest, strict=True)))


def training_blocks(cache: ActivationCache, hook: str, max_tokens: int) -> Iterator[Float[Tensor, "rows d_in"]]:
    """Eligible training tokens from whole contexts, evenly spaced over the cache, at most `max_tokens`.

    Raises:
        CacheError: one is not finite.
    """
    length = cache.context_length
    stride = max(1, -(-cache.rows(TRAIN) // max(max_tokens, length)))
    first_context = 0
    for number in range(cache.shards(TRAIN)):
        eligible = cache.eligible_shard(TRAIN, number)
        context = first_context + torch.arange(len(eligible)) // length
        activations, scale = cache.activation_shard(hook, TRAIN, number)
        for chosen in (eligible & (context % stride == 0)).nonzero().flatten().split(BLOCK_TOKENS):
            if len(chosen):
                x = dequantise(activations[chosen], None if scale is None else scale[chosen])
                check_finite(x, cache, hook)
                yield x
        first_context += -(-len(eligible) // length)


def check_finite(x: Tensor, cache: ActivationCache, hook: str) -> None:
    """Raise CacheError if an activation is infinite or not a number."""
    bad = int((~torch.isfinite(x).all(-1)).sum())
    if bad:
        raise CacheError(
            f"cache {str(cache.path)!r}: {bad:,} of {len(x):,} tokens at {hook!r} have infinite or not-a-number "
            f"activations (stored as {cache.manifest.dtype}); {_way_out(cache.manifest.dtype)}"
        )


def _way_out(dtype: str) -> str:
    """What to do about it, by the stored number type."""
    if dtype in ("float32", "bfloat16"):
        return "check the model's weights, and harvest again"
    return "harvest again with harvest.dtype=bfloat16 or float32"


def _nothing_left(cache: ActivationCache, settings: EvaluationConfig, rows: int) -> str:
    if rows == 0:
        return (
            f"evaluation.tokens={settings.tokens}: less than one context of {cache.context_length} tokens; "
            f"set at least {cache.context_length}"
        )
    return f"evaluation: all {rows:,} held-out tokens read are masked by the token policy; raise evaluation.tokens"
