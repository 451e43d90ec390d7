"""The back end for CPUs, from PyTorch's own operators: it runs on any device, but is designed for caches and cores.

The encoder's product is computed some rows at a time in one buffer, which the next rows overwrite, so that
`[batch, d_sae]` never exists. Gradients are computed, used and dropped a block of features at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.optim.adam import adam

from sae.kernels.composed import composed_residual
from sae.kernels.interface import (
    DENSE_ABOVE,
    AdamStep,
    FactoredGradient,
    Gradient,
    Moments,
    RowGradient,
    Selection,
    Subset,
)
from sae.kernels.pattern import Pattern
from sae.kernels.products import affine, makes_its_own, product

CHUNK_NUMBERS, CHUNK_ROWS, LEAST_ROWS = 1 << 25, 512, 256
"""Largest size of a buffer: in numbers, and in rows if it has more than `KEPT_NUMBERS`; the same for new memory."""
KEPT_NUMBERS = (1 << 23) - 4096
"""Largest float32 buffer that malloc keeps for the next call; from 32 MiB up, it gets new, cleared pages each time."""
GROUP_SIZE = 8
BATCH_GROUP_SIZES = (64, 32, 16, 8)
BLOCK_FEATURES = 512
SURPLUS = 1.25
"""Number of entries that a chunk contributes to the batch's selection, relative to its share."""

Compare = Callable[[Tensor, Tensor], Bool[Tensor, "..."]]


def select_topk(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    k: int,
    subset: Subset | None = None,
) -> Selection:
    in_rows, in_subset = [], []
    for _, pre in _chunks(x, encoder, bias):
        in_rows.append(largest(pre, k))
        in_subset += _largest_in_subset(pre, subset)
    values, features = _joined(in_rows)
    return Selection(Pattern.from_indices(features, len(encoder)), values.flatten(), *_joined(in_subset))


def select_batch_topk(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    count: int,
    subset: Subset | None = None,
) -> Selection:
    """Each chunk contributes all entries that reach a bound, at least `SURPLUS` times its share of `count`.

    The count-th largest contribution cannot exceed the count-th largest of the batch. A chunk with a higher bound may
    have left out an entry that belongs to the selection. Such chunks are rare; they are computed again with that bound.
    """
    found, guesses, in_subset = [], [], []
    for rows, pre in _chunks(x, encoder, bias):
        guess = _guess(pre, int(SURPLUS * count * len(pre) / len(x)) + 1)
        guesses.append((rows, guess))
        found.append(_find(pre, rows.start, guess, torch.lt))
        in_subset += _largest_in_subset(pre, subset)
    bound = least(torch.cat([values for _, values in found]).topk(count, sorted=False).values)
    for number, (rows, guess) in enumerate(guesses):
        if guess > bound:
            for _, pre in _chunks(x[rows], encoder, bias):
                found[number] = _find(pre, rows.start, bound, torch.lt)
    places, values = _joined(found)
    kept = values.topk(count, sorted=False).indices.sort().values
    return Selection(Pattern.from_places(places[kept], len(x), len(encoder)), values[kept], *_joined(in_subset))


def select_above(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    threshold: Float[Tensor, " d_sae"],
) -> Selection:
    places, values = _joined([_find(pre, rows.start, threshold, torch.le) for rows, pre in _chunks(x, encoder, bias)])
    return Selection(Pattern.from_places(places, len(x), len(encoder)), values)


def decode(
    pattern: Pattern, values: Float[Tensor, " pairs"], decoder: Float[Tensor, "d_sae d_in"]
) -> Float[Tensor, "batch d_in"]:
    if pattern.density > DENSE_ABOVE:
        return product(pattern.dense(values), decoder.T)
    return _bags(pattern.features, pattern.offsets, values, decoder)


def sampled_product(
    pattern: Pattern, gradient: Float[Tensor, "batch d_in"], decoder: Float[Tensor, "d_sae d_in"]
) -> Float[Tensor, " pairs"]:
    if pattern.density > DENSE_ABOVE:
        return product(gradient, decoder).view(-1)[pattern.rows * pattern.d_sae + pattern.features]
    if pattern.pairs == 0:
        return gradient.new_zeros(0)
    _expect_beta_warning()
    left, right = _summable(gradient), _summable(decoder)
    places = torch.sparse_csr_tensor(
        pattern.offsets,
        pattern.features,
        left.new_zeros(pattern.pairs),
        size=(pattern.batch, pattern.d_sae),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(places, left, right.T, beta=0.0).values().to(gradient.dtype)


residual = composed_residual(decode, sampled_product)


def feature_sums(term: FactoredGradient) -> Float[Tensor, "d_sae d_in"]:
    if term.pattern.density > DENSE_ABOVE:
        return product(term.pattern.dense(term.coefficients).T, term.rows.T)
    order, rows, offsets = term.pattern.by_feature
    return _bags(rows, offsets, term.coefficients[order], term.rows)


def column_sums(pattern: Pattern, values: Float[Tensor, " pairs"]) -> Float[Tensor, " d_sae"]:
    summands = _summable(values)
    return summands.new_zeros(pattern.d_sae).index_add_(0, pattern.features, summands).to(values.dtype)


def gradient_squares(
    weight: Float[Tensor, "d_sae d_in"], gradient: Gradient, unit_rows: bool
) -> Float[Tensor, " d_sae"]:
    blocks = [change.square().sum(-1) for _, change in _gradient_blocks(weight, gradient, unit_rows)]
    return torch.cat(blocks) if blocks else weight.new_zeros(0)


def adam_(
    weight: Float[Tensor, "d_sae d_in"],
    moments: Moments,
    gradient: Gradient,
    step: AdamStep,
    copy: Float[Tensor, "d_sae d_in"] | None = None,
) -> None:
    for block, change in _gradient_blocks(weight, gradient, step.unit_rows):
        rows = weight[block]
        if step.scale is not None:
            change.mul_(step.scale)
        adam(
            [rows], [change], [moments.first[block]], [moments.second[block]], [],
            [torch.full((), float(step.number - 1), device=weight.device)],
            fused=True, amsgrad=False, maximize=False, weight_decay=0.0,
            lr=step.lr, beta1=step.beta1, beta2=step.beta2, eps=step.eps,
        )  # fmt: skip
        if step.unit_rows:
            norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
            rows /= norms.clamp_min(torch.finfo(rows.dtype).tiny)
        if copy is not None:
            copy[block] = rows


def largest(pre: Float[Tensor, "rows n"], k: int) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
    """The k largest of each row, in no order, and their columns.

    All of them are in the k groups of columns with the largest maxima, so only those groups are searched. The largest
    maxima are found in the same way. Columns of a group are n / `GROUP_SIZE` apart, so that one instruction computes
    the maxima of neighbouring groups.
    """
    n = pre.shape[1]
    if n % GROUP_SIZE or n < 2 * k * GROUP_SIZE:  # with fewer groups, the search costs more than it saves
        return pre.topk(k, dim=-1, sorted=False)
    grouped = pre.unflatten(-1, (GROUP_SIZE, -1))
    _, chosen = largest(grouped.amax(1), k)
    candidates = grouped.gather(2, chosen[:, None].expand(-1, GROUP_SIZE, -1)).flatten(1)
    values, places = candidates.topk(k, dim=-1, sorted=False)
    return values, chosen.gather(1, places % k) + places // k * (n // GROUP_SIZE)


def _chunks(x: Tensor, encoder: Tensor, bias: Tensor) -> Iterator[tuple[slice, Float[Tensor, "rows d_sae"]]]:
    """x · encoderᵀ + bias, some rows at a time; each is overwritten by the next."""
    own = makes_its_own(x, encoder)
    least_rows = LEAST_ROWS if own else CHUNK_ROWS
    most = max(1, min(CHUNK_NUMBERS // len(encoder), max(least_rows, KEPT_NUMBERS // len(encoder))))
    size = -(-len(x) // -(-len(x) // most)) if len(x) else 1
    buffer = None if own else bias.new_empty(min(size, len(x)), len(encoder))
    for start in range(0, max(len(x), 1), size):
        rows = slice(start, min(start + size, len(x)))
        yield rows, affine(x[rows], encoder, bias, None if buffer is None else buffer[: rows.stop - start])


def _largest_in_subset(pre: Float[Tensor, "rows d_sae"], subset: Subset | None) -> list[tuple[Tensor, Tensor]]:
    """The second selection from a chunk: values and places `[rows, k]`, in a list that is empty without a subset."""
    if subset is None:
        return []
    return [largest(pre.index_select(1, subset.features).add_(subset.penalty), subset.k)]


def _joined(chunks: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The first and the second tensors of all chunks; nothing without chunks."""
    return [torch.cat(parts) for parts in zip(*chunks, strict=True)]


def _find(
    pre: Float[Tensor, "rows d_sae"], first_row: int, bound: float | Tensor, misses: Compare
) -> tuple[Int[Tensor, " pairs"], Float[Tensor, " pairs"]]:
    """Entries that do not miss the bound (shared, or one per feature), and all NaNs; skips groups without any.

    Args:
        pre: a chunk.
        first_row: number of the chunk's first row in the batch.
        bound: the bound.
        misses: `torch.lt` or `torch.le`.

    Returns:
        Their places row · d_sae + feature, ascending, and their values.
    """
    n = pre.shape[1]
    size = next((size for size in BATCH_GROUP_SIZES if n % size == 0), 1)
    bounds = bound.view(-1, size) if isinstance(bound, Tensor) else pre.new_full((1, 1), bound)
    maxima = pre.unflatten(-1, (-1, size)).amax(-1)
    worth = misses(maxima, bounds.amin(-1)).logical_not_().flatten().nonzero().flatten()
    candidates = pre.view(-1, size)[worth]
    group, lane = misses(candidates, bounds[worth % len(bounds)]).logical_not_().nonzero(as_tuple=True)
    return first_row * n + worth[group] * size + lane, candidates[group, lane]


def _guess(pre: Float[Tensor, "rows d_sae"], count: int) -> float:
    """A number that at least `count` entries reach, and not many more: the count-th largest of the groups' maxima.

    Without groups, or with fewer than 2 · `count`, it is the count-th largest entry itself.
    """
    n, numbers = pre.shape[1], pre.numel()
    size = next((size for size in BATCH_GROUP_SIZES if n % size == 0 and 2 * count * size <= numbers), 1)
    maxima = pre.view(-1, size).amax(-1) if size > 1 else pre.flatten()
    return least(maxima.topk(min(count, len(maxima)), sorted=False).values)


def least(values: Float[Tensor, " n"]) -> float:
    """The smallest value; a NaN exceeds everything."""
    return float(values.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).min())


def _gradient_blocks(weight: Tensor, gradient: Gradient, unit_rows: bool) -> Iterator[tuple[slice, Tensor]]:
    """The gradient, some features at a time, without its part along the weight's rows if `unit_rows`."""
    terms = [
        (term, term.coefficients[term.pattern.by_feature.order])
        for term in gradient.terms
        if term.pattern.density <= DENSE_ABOVE
    ]
    matrices = [feature_sums(term) for term in gradient.terms if term.pattern.density > DENSE_ABOVE]
    if gradient.dense is not None:
        matrices.append(gradient.dense)
    sorted_blocks = [_sort(block) for block in gradient.blocks]
    for start in range(0, len(weight), BLOCK_FEATURES):
        block = slice(start, min(start + BLOCK_FEATURES, len(weight)))
        rows = weight[block]
        change = _sum(terms, matrices, block, weight)
        for features, part in sorted_blocks:
            first, last = torch.searchsorted(features, features.new_tensor([block.start, block.stop])).tolist()
            change.index_add_(0, features[first:last] - start, part[first:last])
        if unit_rows:
            change.addcmul_((change * rows).sum(-1, keepdim=True), rows, value=-1)
        yield block, change


def _sum(
    terms: Sequence[tuple[FactoredGradient, Tensor]], matrices: Sequence[Tensor], block: slice, like: Tensor
) -> Float[Tensor, "block d_in"]:
    """A block of features of the sum of sparse terms, each with its coefficients by feature, and dense matrices."""
    total = None
    for term, coefficients in terms:
        _, rows, offsets = term.pattern.by_feature
        pairs = slice(int(offsets[block.start]), int(offsets[block.stop]))
        part = _bags(rows[pairs], offsets[block.start : block.stop + 1] - pairs.start, coefficients[pairs], term.rows)
        total = part if total is None else total.add_(part)
    for matrix in matrices:
        total = matrix[block].clone() if total is None else total.add_(matrix[block])
    return like.new_zeros(block.stop - block.start, like.shape[1]) if total is None else total


def _summable(x: Tensor) -> Tensor:
    """Convert dtypes of fewer bits to float32, because their sums would be rounded at every step."""
    return x.float() if x.dtype.itemsize < 4 else x


def _sort(block: RowGradient) -> tuple[Tensor, Tensor]:
    features, order = block.features.sort()
    return features, block.gradient[order]


def _bags(
    rows: Int[Tensor, " pairs"],
    offsets: Int[Tensor, " bags_plus_1"],
    coefficients: Float[Tensor, " pairs"],
    matrix: Float[Tensor, "n d_in"],
) -> Float[Tensor, "bags d_in"]:
    """Bag i: Σ over its pairs of coefficient · matrix[row]."""
    return torch.nn.functional.embedding_bag(
        rows, matrix, offsets, per_sample_weights=coefficients, mode="sum", include_last_offset=True
    )


@cache
def _expect_beta_warning() -> None:
    """Trigger and suppress PyTorch's single warning that its CSR tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.zeros(0, dtype=torch.int64), torch.zeros(0), size=(1, 1))
