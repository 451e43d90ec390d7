"""Running counts of every feature, and the firings kept so far, on the device where tokens are encoded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.activations.cache import uploaded
from sae.config.settings import FeaturesConfig
from sae.features.best import Kept, Lowest, strength_keys
from sae.features.examples import Examples, pick_examples, reservoir_size
from sae.features.groups import ExampleGroups
from sae.features.histogram import FINE_BINS, bin_edges, coarsen, fine_bins
from sae.features.keys import firing_keys, row_keys
from sae.features.ordering import places_of
from sae.features.scan import Fired
from sae.features.windows import Reach, Windows
from sae.features.write import Collected

ROOM = 1 << 19
"""Smallest number of firings added before the best are selected again."""


@dataclass(frozen=True)
class _Candidates:
    """Firings of a few contexts of which some may be kept.

    Attributes:
        value: activation of each firing, 0 if the feature did not fire.
        row: row of each token in the split.
        group: the group of each token.
        column: column of each token in the windows' grid.
        key: random key of each firing.
        strong, sampled: whether the firing may be among the strongest, or in the sample.
        chosen: whether it may be either.
        count: number of those, on its way from a GPU; None on a CPU.
        arrived: event after which it is there.
    """

    fired: Fired
    value: Float[Tensor, " firings"]
    row: Int[Tensor, " tokens"]
    group: Int[Tensor, " tokens"]
    column: Int[Tensor, " tokens"]
    key: Int[Tensor, " firings"]
    strong: Bool[Tensor, " firings"]
    sampled: Bool[Tensor, " firings"]
    chosen: Bool[Tensor, " firings"]
    count: Int[Tensor, ""] | None
    arrived: torch.cuda.Event | None

    def places(self) -> Int[Tensor, " chosen"]:
        """Places of the chosen firings; does not wait for what was launched after them."""
        if self.count is None or self.arrived is None:
            return places_of(self.chosen)
        self.arrived.synchronize()
        return places_of(self.chosen, int(self.count))


class Collector:
    """Counts, sums and histograms of firings, and those that can still become examples.

    On a GPU nothing here waits for the device, except for the number of candidates in the contexts before the last, and
    when the buffer of the firings kept is full.

    Args:
        d_sae: number of features.
        settings: what to keep.
        context_length: rows per context.
        scale: scale of the histograms.
        seed: seed of the random samples.
        groups: groups that give one of the strongest examples each.
        rows: the most rows that will be added.
        device: device of the firings.
    """

    def __init__(
        self,
        d_sae: int,
        settings: FeaturesConfig,
        context_length: int,
        scale: float,
        seed: int,
        groups: ExampleGroups,
        rows: int,
        device: str | torch.device = "cpu",
    ) -> None:
        self.d_sae, self.settings, self.scale, self.seed, self.groups = d_sae, settings, scale, seed, groups
        self.device = torch.device(device)
        self.reach = Reach(settings.before, settings.after, context_length)
        self.windows = Windows(d_sae, self.reach.within_context(), device)
        self.strongest = Lowest(d_sae, settings.top, worst=-2, device=device)  # a value > 0
        self.sample = Lowest(d_sae, reservoir_size(settings), device=device)
        room = max(ROOM, d_sae * (self.strongest.n + self.sample.n) // 2)
        self.kept = Kept(self.strongest, self.sample, self.windows.reach.width, room)
        self.sum = torch.zeros(d_sae, dtype=torch.float64, device=device)
        counts = torch.int32 if rows < 1 << 31 else torch.int64
        self.histogram = torch.zeros(d_sae * FINE_BINS, dtype=counts, device=device)
        self.rows = self.tokens = 0
        self.waiting: list[_Candidates] = []
        self.runs: list[tuple[np.ndarray, np.ndarray]] = []
        self.last_document = -1

    @torch.no_grad()
    def add(self, fired: Fired) -> None:
        """Add the firings in a few contexts."""
        self._note_documents(fired.batch.documents.flatten().numpy())
        self.rows += fired.batch.tokens.numel()
        self.tokens += fired.tokens
        fires = fired.value > 0
        value = torch.where(fires, fired.value, 0.0)
        self._count(fired.feature, value, fires)
        self.waiting.append(self._candidates(fired, value, fires))
        if len(self.waiting) > _batches_behind(self.device):
            self._keep(self.waiting.pop(0))

    @torch.no_grad()
    def finish(self) -> Collected:
        """The collected result; call it after the last batch."""
        while self.waiting:
            self._keep(self.waiting.pop(0))
        self.kept.select()
        histogram = self.histogram.view(self.d_sae, FINE_BINS).cpu().long()
        count = histogram.sum(1).numpy()
        examples = pick_examples(self.kept, histogram, self.scale, self.settings, self.reach)
        starts, documents = (np.concatenate(parts) for parts in zip(*self.runs, strict=True))
        return Collected(
            rows=self.rows,
            tokens=self.tokens,
            count=count,
            mean=(self.sum.cpu().numpy() / np.maximum(count, 1)).astype(np.float32),
            max=_largest(examples, self.d_sae),
            histogram=coarsen(histogram.numpy()),
            edges=bin_edges(self.scale),
            examples=examples,
            document_start=starts,
            document=documents,
            one_per=self.groups.unit,
        )

    def _note_documents(self, documents: Int[np.ndarray, " rows"]) -> None:
        begins = np.flatnonzero(np.diff(documents, prepend=self.last_document))
        self.runs.append((self.rows + begins, documents[begins]))
        self.last_document = int(documents[-1])

    def _count(
        self, feature: Int[Tensor, " firings"], value: Float[Tensor, " firings"], fires: Bool[Tensor, " firings"]
    ) -> None:
        cell = (feature * FINE_BINS).add_(fine_bins(value, self.scale))
        self.histogram.scatter_add_(0, cell, fires.to(self.histogram.dtype))
        self.sum.index_add_(0, feature, value.double())

    def _candidates(
        self, fired: Fired, value: Float[Tensor, " firings"], fires: Bool[Tensor, " firings"]
    ) -> _Candidates:
        """Firings that come before the last one kept of their feature, by one of the rules."""
        row = fired.offset + fired.batch.first_row
        group = uploaded(torch.from_numpy(self.groups.number(fired.batch)), self.device).index_select(0, fired.offset)
        row_key = row_keys(row, "features: examples", self.seed)
        key = firing_keys(row_key.index_select(0, fired.token), fired.feature)
        strong = strength_keys(value) <= self.strongest.limit.index_select(0, fired.feature)
        sampled = (key <= self.sample.limit.index_select(0, fired.feature)).logical_and_(fires)
        chosen = strong | sampled
        count = arrived = None
        if self.device.type == "cuda":
            count, arrived = chosen.sum().to("cpu", non_blocking=True), torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(self.device))
        column = self.windows.columns(fired.offset)
        return _Candidates(fired, value, row, group, column, key, strong, sampled, chosen, count, arrived)

    def _keep(self, candidates: _Candidates) -> None:
        """Put the candidates into the buffer, with their windows."""
        fired, kept = candidates.fired, self.kept
        grid_column = candidates.column.index_select(0, fired.token)
        left = candidates.places()
        while len(left):
            if kept.room < len(left):
                kept.select()
            chosen, left = left[: kept.room], left[kept.room :]
            added, token = kept.places(len(chosen)), fired.token.index_select(0, chosen)
            rows = fired.batch.tokens.numel()
            self.windows.cut(fired.feature, grid_column, candidates.value, rows, chosen, kept.window[added])
            kept.feature[added] = fired.feature.index_select(0, chosen)
            for column, source, index in (
                (kept.row, candidates.row, token),
                (kept.value, candidates.value, chosen),
                (kept.group, candidates.group, token),
                (kept.key, candidates.key, chosen),
                (kept.is_strong, candidates.strong, chosen),
                (kept.is_sampled, candidates.sampled, chosen),
            ):
                torch.index_select(source, 0, index, out=column[added])


def _batches_behind(device: torch.device) -> int:
    """How many batches later candidates are kept: on a GPU, when the next one has been launched."""
    return int(device.type != "cpu")


def _largest(examples: Examples, d_sae: int) -> Float[np.ndarray, " d_sae"]:
    """The activation of each feature's first example, which is the strongest of all; 0 if it has none."""
    largest = np.zeros(d_sae, dtype=np.float32)
    feature, first = np.unique(examples.feature, return_index=True)
    largest[feature] = examples.value[first]
    return largest
