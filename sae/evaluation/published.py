"""Published metrics of other packages, by their own rules, in one pass over the first held-out contexts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.activations.cache import ActivationCache, ContextBatch
from sae.config.splits import HELD_OUT
from sae.evaluation.budget import joined, settled_tokens
from sae.evaluation.held_out import HeldOut
from sae.evaluation.published_formulas import (
    CONTEXTS_PER_BATCH,
    SAEBENCH,
    SAELENS,
    Batches,
    BatchSums,
    PublishedLosses,
    of_activations,
    of_losses,
)
from sae.evaluation.reconstruction import Reconstruction, Reconstructor
from sae.model.language_model import LanguageModel
from sae.results.estimate import double, row_sums

_MEAN = "\0mean"
_CLEAN, _ZERO = "clean", "zero"


@dataclass(frozen=True)
class PublishedScores:
    """Numbers by the formulas of `published_formulas.py`, for comparison with published ones only.

    Attributes:
        tokens: number of tokens kept, which are those whose id is not a special token's.
        contexts: number of whole contexts that they come from.
        of: by package, values by the names they have there; None if a formula gives no number.
        mean_predictor: the same for x̂ = x̄, without losses: the values without any reconstruction.
    """

    tokens: int
    contexts: int
    of: dict[str, dict[str, float | None]]
    mean_predictor: dict[str, dict[str, float | None]]

    def to_json(self) -> dict[str, Any]:
        return {
            "for": "comparison with published numbers only",
            "tokens": self.tokens,
            "contexts": self.contexts,
            "contexts_per_batch": CONTEXTS_PER_BATCH,
            "formulas": self.of,
            "mean_predictor": self.mean_predictor,
        }


def measure_published(
    held_out: HeldOut, dictionaries: Mapping[str, Reconstructor], mean: Float[Tensor, " d_in"]
) -> dict[str, PublishedScores]:
    """Every legacy formula for each dictionary, on the first `settings.legacy_tokens` held-out tokens.

    Tokens are kept unless the cache masks their id; first positions count if their token does, as in the packages.
    Those mask the tokenizer's BOS, EOS, PAD (SAELens: also SEP) and keep other special tokens; caches mask all.
    Losses are measured with x̂ at the kept positions (SAELens) and at all of them (SAEBench, whose
    `exclude_special_tokens_from_reconstruction` is off by default), and with 0 at all of them (both).

    Returns:
        Scores by the dictionaries' names; empty if the tokens hold no whole context.
    """
    if not dictionaries:
        return {}
    cache, device, progress = held_out.cache, held_out.device, held_out.progress
    special = torch.tensor(cache.policy.masked_ids, dtype=torch.long)
    reconstructors = {**dictionaries, _MEAN: _mean_predictor(mean.float().to(device))}
    sums = {name: BatchSums(cache.d_in(held_out.hook)) for name in reconstructors}
    losses = _LossLists(dictionaries if held_out.language_model is not None else ())
    limit = settled_tokens(held_out.settings.legacy_tokens) or 0
    contexts, rows, total = 0, 0, min(cache.rows(HELD_OUT), limit)
    stage = held_out.unfinished.stage(
        "legacy formulas", {**{str(place): one for place, one in enumerate(sums.values())}, "losses": losses}
    )
    if limit:
        progress("legacy formulas", min(total, stage.done * CONTEXTS_PER_BATCH * cache.context_length), total)
    for step, batch in enumerate(_whole_contexts(cache, held_out.hook, limit), 1):
        is_kept = ~torch.isin(batch.tokens, special)
        rows += batch.tokens.numel()
        if step <= stage.done:
            contexts += len(batch.tokens) if is_kept.any() else 0
            continue
        if not is_kept.any():
            continue
        contexts += len(batch.tokens)
        assert batch.activations is not None
        x = batch.activations[is_kept].to(device)
        for name, reconstructor in reconstructors.items():
            reconstruction = reconstructor(x)
            sums[name].add_(x, reconstruction.x_hat, reconstruction.codes)
        if held_out.language_model is not None:
            for key, value in _losses(held_out, held_out.language_model, batch, is_kept, dictionaries):
                losses.sums[key].append(value)
        stage.step(step)
        progress("legacy formulas", rows, total)
    stage.keep()
    if not contexts:
        return {}
    batches = {name: part.batches() for name, part in sums.items()}
    tokens, baseline = int(batches[_MEAN].tokens.sum()), _activation_metrics(batches[_MEAN])
    scores = {
        name: {
            package: metrics | _loss_metrics(losses.sums, package, name)
            for package, metrics in _activation_metrics(part).items()
        }
        for name, part in batches.items()
    }
    return {name: PublishedScores(tokens, contexts, scores[name], baseline) for name in dictionaries}


class _LossLists:
    """Sums of each batch by (kind, replacement).

    Args:
        dictionaries: names of those whose losses are measured.
    """

    def __init__(self, dictionaries: Iterable[str]) -> None:
        with_x_hat = (f"{package} {name}" for name in dictionaries for package in (SAEBENCH, SAELENS))
        replacements = [_CLEAN, _ZERO, *with_x_hat]
        counts = [("ce count", _CLEAN), ("kl count", _CLEAN)]
        self.sums: dict[tuple[str, str], list[float]] = {
            key: []
            for key in (*counts, *((kind, replacement) for replacement in replacements for kind in ("ce", "kl")))
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The sums, for `load_state_dict`."""
        return {str(place): torch.tensor(sums, dtype=torch.float64) for place, sums in enumerate(self.sums.values())}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from sums of the same dictionaries."""
        for place, key in enumerate(self.sums):
            self.sums[key] = state[str(place)].tolist()


def _activation_metrics(batches: Batches) -> dict[str, dict[str, float | None]]:
    return {package: of_activations(package, batches) for package in (SAELENS, SAEBENCH)}


def _loss_metrics(losses: Mapping[tuple[str, str], list[float]], package: str, name: str) -> dict[str, float | None]:
    with_sae = f"{package} {name}"
    if not losses.get(("ce", with_sae)):
        return {}
    return of_losses(
        PublishedLosses(
            ce_with_sae=_mean(losses, "ce", with_sae),
            ce_without_sae=_mean(losses, "ce", _CLEAN),
            ce_with_ablation=_mean(losses, "ce", _ZERO),
            kl_with_sae=_mean(losses, "kl", with_sae),
            kl_with_ablation=_mean(losses, "kl", _ZERO),
        )
    )


def _mean(losses: Mapping[tuple[str, str], list[float]], kind: str, replacement: str) -> float:
    """Mean over all batches, per counted token."""
    return sum(losses[kind, replacement]) / sum(losses[f"{kind} count", _CLEAN])


def _whole_contexts(cache: ActivationCache, hook: str, tokens: int) -> Iterator[ContextBatch]:
    """Whole contexts, as the packages have no others, in batches of one size; the last may be smaller."""
    pending: ContextBatch | None = None
    if not tokens:
        return
    for batch in cache.contexts(HELD_OUT, hook, batch_contexts=CONTEXTS_PER_BATCH, max_tokens=tokens):
        if batch.tokens.shape[1] < cache.context_length:
            continue
        pending = batch if pending is None else joined([pending, batch])
        if len(pending.tokens) >= CONTEXTS_PER_BATCH:
            yield pending.contexts(0, CONTEXTS_PER_BATCH)
            pending = pending.contexts(CONTEXTS_PER_BATCH, len(pending.tokens))
    if pending is not None and len(pending.tokens):
        yield pending


def _mean_predictor(mean: Float[Tensor, " d_in"]) -> Reconstructor:
    return Reconstructor("x̂ = x̄", 0, lambda x: Reconstruction(mean.expand(len(x), -1)))


def _losses(
    held_out: HeldOut, language_model: LanguageModel, batch: ContextBatch, is_kept: Bool[Tensor, "context seq"],
    dictionaries: Mapping[str, Reconstructor],
) -> Iterator[tuple[tuple[str, str], float]]:  # fmt: skip
    """Sums over a batch by (kind, replacement), and numbers of counted tokens."""
    tokens, is_kept = batch.tokens.to(language_model.device), is_kept.to(language_model.device)
    replacements: dict[str, Callable[[Tensor], Tensor]] = {_CLEAN: lambda x: x, _ZERO: torch.zeros_like}
    for name, reconstructor in dictionaries.items():
        shared = _SharedReconstruction(reconstructor, held_out.device)
        replacements[f"{SAEBENCH} {name}"] = shared
        replacements[f"{SAELENS} {name}"] = lambda x, shared=shared: torch.where(is_kept[..., None], shared(x), x)
    yield ("ce count", _CLEAN), float(is_kept[:, :-1].sum())
    yield ("kl count", _CLEAN), float(is_kept.sum())
    clean: list[Tensor] = []
    passes = language_model.replaced_logits(tokens, held_out.hook, list(replacements.values()))
    for replacement, logits in zip(replacements, passes, strict=True):
        ce, kl = 0.0, 0.0
        for number, (context_logits, counted, ids) in enumerate(zip(logits, is_kept, tokens, strict=True)):
            log_q = context_logits.log_softmax(-1)
            if replacement == _CLEAN:
                clean.append(log_q)
            following = -log_q[:-1].gather(-1, ids[1:, None])[:, 0]
            ce += float(double(following[counted[:-1]]).sum())
            log_p = clean[number]
            kl += float(row_sums((log_p - log_q).mul_(log_p.exp()))[counted].sum())
        yield ("ce", replacement), ce
        yield ("kl", replacement), kl


class _SharedReconstruction:
    """Reconstructions that two passes share, computed once."""

    def __init__(self, reconstructor: Reconstructor, device: str | torch.device) -> None:
        self.reconstructor, self.device = reconstructor, device
        self.x_hat: Tensor | None = None

    def __call__(self, x: Float[Tensor, "context seq d_in"]) -> Float[Tensor, "context seq d_in"]:
        if self.x_hat is None:
            rows = x.flatten(0, 1).float().to(self.device)
            self.x_hat = self.reconstructor(rows).x_hat.to(x).view_as(x)
        return self.x_hat
