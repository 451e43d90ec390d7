"""Build a feature store from a dictionary and a cache, in one streaming pass over the activations."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int

from sae.activations.cache import ActivationCache
from sae.activations.metadata import place_of
from sae.config.progress import StageProgress
from sae.config.settings import FeaturesConfig
from sae.config.splits import TRAIN
from sae.dictionary.base import Dictionary
from sae.dictionary.neighbours import nearest_neighbours
from sae.dictionary.origin import check_belongs
from sae.errors import ConfigError
from sae.features.best import Best
from sae.features.block import Block, Reach, make_block
from sae.features.examples import pick_examples, reservoir_size
from sae.features.groups import ExampleGroups
from sae.features.histogram import FINE_BINS, LARGEST_BITS, bin_edges, coarsen, fine_bins, float_bits
from sae.features.logits import LogitEffects, logit_effects
from sae.features.scan import Fired, scan_contexts
from sae.features.store import Features
from sae.features.write import Collected, write_store
from sae.model.vocabulary import Vocabulary
from sae.numerics import seeding
from sae.numerics.modes import in_own_modes

if TYPE_CHECKING:
    from sae.model.language_model import LanguageModel

BLOCK_FIRINGS = 1 << 21


@in_own_modes
def collect(
    dictionary: Dictionary,
    cache: ActivationCache,
    folder: str | Path,
    settings: FeaturesConfig,
    *,
    hook: str,
    tokenizer: Any,
    language_model: LanguageModel | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    batch_contexts: int | None = None,
    progress: StageProgress | None = None,
) -> Features:
    """Scan the cache's training tokens once and write a feature store.

    Each token is encoded once; windows are cut while its codes are in memory. Memory does not grow with the number of
    tokens. The result does not depend on `batch_contexts` (beyond the rounding of matrix products).

    Args:
        dictionary: takes raw activations at `hook`; a transcoder's logits are those of its output.
        cache: its training split is read.
        folder: where the store is written; an older store there is replaced.
        settings: what to keep.
        hook: the hook point whose activations are encoded.
        tokenizer: tokenizer of the model that the cache was harvested from; its vocabulary is saved in the store.
        language_model: for the logits each feature raises and lowers; None: the store has no logits.
        seed: seed of the random samples.
        device: where tokens are encoded.
        batch_contexts: number of contexts encoded at once; None: about 2²⁶ / d_sae tokens.
        progress: called with the number of tokens done and the total.

    Raises:
        CacheError: the hook point is not in the cache, the cache is from another model than the dictionary's, or the
            store cannot be written.
        ConfigError: `settings.tokens` is less than one context, or the dictionary reads another hook point or width.
    """
    origin = dictionary.origin
    check_belongs(origin, place_of(cache), reads=hook)
    output_hook = origin.gives.hook or hook
    if dictionary.W_dec.device != torch.device(device):
        dictionary = copy.deepcopy(dictionary).to(device)
    collected = scan(dictionary, cache, settings, hook, seed, batch_contexts, progress)
    vocabulary = Vocabulary.of(tokenizer)
    return write_store(
        Path(folder),
        dictionary,
        cache,
        collected,
        settings,
        hook=hook,
        seed=seed,
        vocabulary=vocabulary,
        logits=_logits(dictionary, language_model, output_hook, settings, len(vocabulary)),
        neighbours=nearest_neighbours(dictionary.W_dec.detach(), settings.neighbours),
    )


def scan(
    dictionary: Dictionary,
    cache: ActivationCache,
    settings: FeaturesConfig,
    hook: str,
    seed: int = 0,
    batch_contexts: int | None = None,
    progress: StageProgress | None = None,
) -> Collected:
    """The streaming pass alone, in memory.

    Raises:
        ConfigError: `settings.tokens` is less than one context.
    """
    scale = cache.statistics(hook).mean_squared_norm ** 0.5 or 1.0
    groups = ExampleGroups.of(cache, settings)
    collector = _Collector(dictionary.d_sae, settings, cache.context_length, scale, seed, groups)
    for fired in scan_contexts(
        dictionary, cache, TRAIN, hook, tokens=settings.tokens, batch_contexts=batch_contexts, progress=progress
    ):
        collector.add(fired)
    if collector.rows == 0:
        raise ConfigError(
            f"features.tokens={settings.tokens}: less than one context of {cache.context_length} tokens; raise it"
        )
    return collector.finish()


def _logits(
    dictionary: Dictionary, language_model: LanguageModel | None, output: str, settings: FeaturesConfig, tokens: int
) -> LogitEffects | None:
    """Logit effects; None without a model, or if `output` is not in the space that the unembedding reads."""
    if language_model is None or not language_model.is_residual(output):
        return None
    return logit_effects(dictionary.W_dec.detach(), language_model.unembedding()[:, :tokens], settings.logits)


class _Collector:
    """Running counts and the firings kept so far; firings are buffered until a block is full."""

    def __init__(
        self, d_sae: int, settings: FeaturesConfig, context_length: int, scale: float, seed: int, groups: ExampleGroups
    ) -> None:
        self.d_sae, self.settings, self.scale, self.seed = d_sae, settings, scale, seed
        self.groups = groups
        self.reach = Reach(settings.before, settings.after, context_length)
        self.top = Best(d_sae, settings.top, self.reach, one_per_group=True)
        self.sample = Best(d_sae, reservoir_size(settings), self.reach, one_per_group=False)
        self.count = np.zeros(d_sae, dtype=np.int64)
        self.sum = np.zeros(d_sae, dtype=np.float64)
        self.histogram = np.zeros((d_sae, FINE_BINS), dtype=np.int64)
        self.rows = self.tokens = self.first_row = self.waiting = 0
        self.firings: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.group_of_row: list[np.ndarray] = []
        self.runs: list[tuple[np.ndarray, np.ndarray]] = []
        self.last_document = -1

    def add(self, fired: Fired) -> None:
        """Add the firings in a few contexts."""
        batch = fired.batch
        self.firings.append((fired.feature, batch.first_row + fired.offset, fired.value))
        documents = batch.documents.flatten().numpy()
        self._note_documents(documents)
        self.group_of_row.append(self.groups.number(batch))
        self.rows += len(documents)
        self.tokens += fired.tokens
        self.waiting += len(fired.value)
        if self.waiting >= BLOCK_FIRINGS:
            self._flush()

    def finish(self) -> Collected:
        """The collected result; call it after the last batch."""
        self._flush()
        starts, documents = (np.concatenate(parts) for parts in zip(*self.runs, strict=True))
        return Collected(
            rows=self.rows,
            tokens=self.tokens,
            count=self.count,
            mean=(self.sum / np.maximum(self.count, 1)).astype(np.float32),
            max=np.where(self.count > 0, self.top.value[:, 0], 0).astype(np.float32),
            histogram=coarsen(self.histogram),
            edges=bin_edges(self.scale),
            examples=pick_examples(self.top, self.sample, self.histogram, self.scale, self.settings),
            document_start=starts,
            document=documents,
            one_per=self.groups.unit,
        )

    def _note_documents(self, documents: Int[np.ndarray, " rows"]) -> None:
        begins = np.flatnonzero(np.diff(documents, prepend=self.last_document))
        self.runs.append((self.rows + begins, documents[begins]))
        self.last_document = int(documents[-1])

    def _flush(self) -> None:
        if not self.group_of_row:
            return
        feature, row, value = (np.concatenate(parts) for parts in zip(*self.firings, strict=True))
        block = make_block(feature, row, value, np.concatenate(self.group_of_row), self.first_row, self.reach)
        self.count += np.bincount(block.feature, minlength=self.d_sae)
        self.sum += np.bincount(block.feature, weights=block.value, minlength=self.d_sae)
        bins = block.feature * FINE_BINS + fine_bins(block.value, self.scale)
        self.histogram += np.bincount(bins, minlength=self.histogram.size).reshape(self.histogram.shape)
        self.top.offer(block, LARGEST_BITS - float_bits(block.value))
        self.sample.offer(block, random_keys(block, "features: examples", self.seed))
        self.first_row, self.waiting = self.rows, 0
        self.firings, self.group_of_row = [], []


def random_keys(block: Block, purpose: str, seed: int) -> Int[np.ndarray, " firings"]:
    """A pseudorandom number in [0, 2³²) for each firing, determined by purpose, seed, row and feature alone."""
    key = seeding.number(purpose, seed)
    row = block.row.astype(np.uint64) + np.uint64(key)
    row = _mix((row ^ (row >> np.uint64(32))).astype(np.uint32)) ^ np.uint32(key >> 32)
    return _mix(row ^ (block.feature.astype(np.uint32) * np.uint32(0x9E3779B1))).astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Spread each input bit over all 32 output bits (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
