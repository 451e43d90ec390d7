"""Losses of the language model when it reads reconstructions: cross-entropy and KL divergence."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.activations.cache import ContextBatch
from sae.config.splits import HELD_OUT
from sae.evaluation.baselines import IDENTITY, Baseline
from sae.evaluation.budget import check_losses, losses_read, spread_contexts
from sae.evaluation.held_out import HeldOut
from sae.evaluation.losses import CleanPass, at_eligible, losses_of
from sae.evaluation.metrics import estimates
from sae.evaluation.reconstruction import Reconstructor
from sae.model.tail import Replacement
from sae.results.estimate import TOKENS, DocumentSums, Estimate, estimate_names, to_json


@dataclass(frozen=True)
class DownstreamScores:
    """Nats per token, over every eligible position that has a next token in its context.

    The loss at position t is that of predicting token t + 1. Whether t counts depends on token t alone, whose
    activation is the one replaced; token t + 1 may be masked. Zero, x̄ and x̂ replace the same eligible positions,
    and the others keep the model's own activations. Differences are paired, per token.

    Attributes:
        tokens: number of positions that count; `EvaluationConfig.baseline_tokens` may set fewer for baselines.
        documents: number of documents they come from.
        ce_clean: next-token loss with the hook point untouched.
        ce_spliced: replaced by x̂.
        ce_zero: replaced by 0.
        ce_mean: replaced by x̄, the mean of the evaluated tokens.
        delta_ce: spliced − clean.
        ce_recovered_zero: (zero − spliced) / (zero − clean): 1 loses nothing, 0 is as bad as 0.
        ce_recovered_mean: (mean − spliced) / (mean − clean), the same against x̄.
        kl: KL(clean ‖ spliced) of the next-token distributions.
        totals: the sums over documents that these are computed from.
    """

    tokens: int
    documents: int
    ce_clean: Estimate
    ce_spliced: Estimate
    ce_zero: Estimate
    ce_mean: Estimate
    delta_ce: Estimate
    ce_recovered_zero: Estimate
    ce_recovered_mean: Estimate
    kl: Estimate
    totals: dict[str, Tensor] = field(repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        return to_json(self)


DOWNSTREAM_NAMES = estimate_names(DownstreamScores)


def measure_downstream(
    held_out: HeldOut, dictionaries: Mapping[str, Reconstructor], baselines: Mapping[Baseline, Reconstructor],
    mean: Float[Tensor, " d_in"],
) -> dict[Hashable, DownstreamScores]:  # fmt: skip
    """Losses with the hook point replaced in turn by 0, x̄ and every reconstruction, in one pass over held-out contexts.

    Baselines are measured on `settings.baseline_tokens` of them only: they lose so much more than dictionaries that few
    tokens are enough, and each of them takes another pass of the model.

    Returns:
        Scores by the keys of both mappings. Those of `IDENTITY` are the clean ones by construction.

    Raises:
        ConfigError: too few tokens to hold one position that counts.
        ModelError: the hook point cannot be replaced.
    """
    other_baselines = {key: reconstructor for key, reconstructor in baselines.items() if key != IDENTITY}
    cache, settings, progress = held_out.cache, held_out.settings, held_out.progress
    documents = len(cache.documents(HELD_OUT))
    everywhere, first = (DocumentSums(documents, _columns(keys)) for keys in (dictionaries, other_baselines))
    stage = held_out.unfinished.stage("language model", {"everywhere": everywhere, "first": first})
    batches = list(spread_contexts(cache, settings))
    rows, total = sum(batch.tokens.numel() for batch, _ in batches[: stage.done]), losses_read(settings, cache)
    progress("language model", rows, total)
    for step, (batch, is_first) in enumerate(batches[stage.done :], stage.done + 1):
        rows += batch.tokens.numel()
        counted = batch.eligible[:, :-1]
        if counted.any():
            spliced: dict[Hashable, Reconstructor] = dict(dictionaries.items())
            if is_first:
                spliced |= other_baselines
            values = _measure_batch(held_out, batch, spliced, mean=mean, check=not everywhere.tokens)
            for sums in (everywhere, first) if is_first else (everywhere,):
                sums.add_(batch.documents[:, :-1][counted], {name: values[name] for name in sums.names[1:]})
        stage.step(step)
        progress("language model", rows, total)
    stage.keep()
    check_losses(everywhere.tokens, cache, settings)
    scores: dict[Hashable, DownstreamScores] = {}
    for sums, keys in ((everywhere, dictionaries), (first, other_baselines)):
        scores |= {key: _scores(sums, _ce(key), _kl(key)) for key in keys}
    return scores | {IDENTITY: _scores(everywhere, "clean", None)}


def _columns(keys: Iterable[Hashable]) -> list[str]:
    return ["clean", "zero", "mean", *(column for key in keys for column in (_ce(key), _kl(key)))]


def _measure_batch(
    held_out: HeldOut, batch: ContextBatch, reconstructors: Mapping[Hashable, Reconstructor], *,
    mean: Float[Tensor, " d_in"], check: bool,
) -> dict[str, Float[Tensor, " rows"]]:  # fmt: skip
    """Numbers of each counted position, by column name; `check` compares the clean pass with the model's own logits."""
    language_model, hook, device = held_out.language_model, held_out.hook, torch.device(held_out.device)
    assert language_model is not None
    tokens = batch.tokens.to(language_model.device)
    eligible = batch.eligible.to(language_model.device)

    rows: list[Tensor] = []

    def clean_pass(x: Tensor) -> Tensor:
        """Change nothing, and keep the eligible activations, which are the same in every pass."""
        rows.append(x[eligible].float().to(device))
        return x

    constants: dict[str, Replacement] = {"zero": torch.zeros_like, "mean": lambda x: mean.to(x).expand_as(x)}
    other_hooks = sorted({reconstructor.reads for reconstructor in reconstructors.values() if reconstructor.reads})
    activations = language_model.activations(tokens, other_hooks) if other_hooks else {}
    read = {name: x[eligible].float().to(device) for name, x in activations.items()}
    reconstructions = [_reconstruction(reconstructor, rows, read) for reconstructor in reconstructors.values()]
    replacements = [at_eligible(eligible, new) for new in (*constants.values(), *reconstructions)]
    logits = language_model.replaced_logits(tokens, hook, [clean_pass, *replacements])
    clean_logits = next(logits)
    if check:
        language_model.tail(hook).check_clean(tokens, clean_logits)
    clean = CleanPass.of(clean_logits, tokens)
    counted = batch.eligible[:, :-1].flatten()
    values = {"clean": clean.losses()[counted]}
    for name in constants:
        values[name] = losses_of(next(logits), tokens)[counted]
    for key in reconstructors:
        losses, divergences = clean.compared(next(logits))
        values |= {_ce(key): losses[counted], _kl(key): divergences[counted]}
    return values


def _reconstruction(reconstructor: Reconstructor, rows: list[Tensor], read: Mapping[str, Tensor]) -> Replacement:
    """x̂ of the activations that the clean pass left in `rows`, or of those that a transcoder reads."""
    return lambda _: reconstructor(read[reconstructor.reads] if reconstructor.reads else rows[0]).x_hat


def _scores(sums: DocumentSums, spliced: str, kl: str | None) -> DownstreamScores:
    """Scores of one reconstructor; without a column of divergences, these are 0."""
    totals = sums.totals(positions=TOKENS, clean="clean", zero="zero", mean="mean", spliced=spliced, kl=kl or "clean")
    if kl is None:
        totals["kl"] = torch.zeros_like(totals["clean"])
    return DownstreamScores(sums.tokens, sums.documents, **estimates(DownstreamScores, totals), totals=totals)


def _ce(key: Hashable) -> str:
    return f"ce {key}"


def _kl(key: Hashable) -> str:
    return f"kl {key}"
