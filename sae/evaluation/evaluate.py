"""Dictionary and cache in, `Report` out: every metric of the dictionary and of its baselines."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sae.activations.cache import ActivationCache
from sae.activations.harvest import check_same_model
from sae.config import EvaluationConfig
from sae.dictionary import Dictionary
from sae.errors import CacheError, ConfigError, FormatError
from sae.evaluation.baselines import fit_pca, fit_random_dictionary, identity
from sae.evaluation.downstream import measure_downstream
from sae.evaluation.reconstruction import ReconstructionSums, Reconstructor, from_dictionary
from sae.evaluation.report import Report, Scores, identify
from sae.evaluation.sparsity import SparsityCounts
from sae.evaluation.streams import ActivationSummary, Progress, held_out_blocks, summarise
from sae.language_model import LanguageModel
from sae.tokens import TokenPolicy


@torch.no_grad()
def evaluate(
    dictionary: Dictionary,
    cache: ActivationCache,
    *,
    hook: str,
    language_model: LanguageModel | None = None,
    settings: EvaluationConfig | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Report:
    """Score a dictionary on a cache's held-out tokens, beside PCA, a random dictionary and the identity.

    Only tokens that the cache's token policy leaves are evaluated. Everything is streamed, summed per document in
    float64, and independent of `settings.batch_contexts`.

    Args:
        dictionary: takes raw activations; it is not changed, and copied where it is not on `device`.
        cache: the activations; baselines are fitted on its training split.
        hook: hook point, one of the cache's.
        language_model: the model that the cache is of; None: no language-model losses.
        settings: how many tokens, and how many contexts at a time.
        device: where reconstructions are computed; the language model stays where it is.
        progress: called with (stage, tokens done, tokens in all).

    Raises:
        CacheError: the hook point is not in the cache, activations are not finite, or the language model is another.
        ConfigError: the dictionary was trained on another hook point or has another width; too few tokens.
        FormatError: the dictionary's weights are not finite.
        ModelError: the hook point cannot be replaced.
    """
    started = time.perf_counter()
    settings, report_progress = settings or EvaluationConfig(), progress or _silent
    _check_dictionary(dictionary, cache, hook)
    if language_model is not None:
        check_same_model(cache.path, cache.manifest, language_model)
        probe = torch.zeros(1, 2, dtype=torch.long, device=language_model.device)
        next(iter(language_model.replaced_logits(probe, hook, [_unchanged])))
    summary = summarise(cache, hook, settings, report_progress)

    def score(name: str, reconstructor: Reconstructor) -> Scores:
        return _score(
            reconstructor, cache, hook, settings,
            summary=summary, progress=lambda *done: report_progress(name, *done), device=device,
        )  # fmt: skip

    dictionary = _on(dictionary, device)
    own = from_dictionary(dictionary, _describe(dictionary))
    scores = {"dictionary": score("dictionary", own)}
    k = baseline_size(dictionary, scores["dictionary"])
    baselines = {
        "pca": fit_pca(cache, hook, k, device, progress=report_progress),
        "random": fit_random_dictionary(cache, hook, dictionary.d_sae, min(k, dictionary.d_sae), device),
        "identity": identity(),
    }
    scores |= {name: score(name, reconstructor) for name, reconstructor in baselines.items()}
    if language_model is not None:
        spliced = {"dictionary": own, "pca": baselines["pca"], "random": baselines["random"]}
        downstream = measure_downstream(
            language_model, cache, hook, spliced,
            mean=summary.mean, settings=settings, device=device, progress=report_progress,
        )  # fmt: skip
        scores = {name: scores[name].with_downstream(downstream[name]) for name in scores}
    trained_with = dictionary.metadata.get("tokens")
    return Report(
        dictionary=identify(dictionary),
        hook=hook,
        model=cache.manifest.model,
        data=cache.manifest.data,
        activations=cache.manifest.identity(hook),
        settings=settings,
        policy=cache.policy,
        training_policy=TokenPolicy.from_json(trained_with) if trained_with else None,
        tokens=summary.tokens,
        masked=summary.masked,
        documents=summary.documents,
        scores=scores.pop("dictionary"),
        baselines=scores,
        dead_in_training=_dead_in_training(dictionary),
        norms=summary.norms,
        seconds=time.perf_counter() - started,
    )


def baseline_size(dictionary: Dictionary, scores: Scores) -> int:
    """Components and features given to the baselines: the dictionary's k, or its mean L0 rounded where it has no k."""
    assert scores.sparsity is not None
    return max(1, int(dictionary.settings().get("k", round(scores.sparsity.l0.value or 0))))


def _score(
    reconstructor: Reconstructor, cache: ActivationCache, hook: str, settings: EvaluationConfig, *,
    summary: ActivationSummary, progress: Callable[[int, int], None], device: str | torch.device,
) -> Scores:  # fmt: skip
    """One pass over the held-out tokens."""
    reconstruction = ReconstructionSums(summary.all_documents, summary.mean)
    sparsity = SparsityCounts(summary.all_documents, reconstructor.features) if reconstructor.features else None
    done = 0
    for block in held_out_blocks(cache, hook, settings):
        x = block.x.to(device)
        result = reconstructor(x)
        reconstruction.add_(x, result.x_hat, block.documents)
        if sparsity is not None and result.codes is not None:
            sparsity.add_(result.codes, block.documents)
        done += len(x)
        progress(done, summary.tokens)
    return Scores(reconstructor.description, reconstruction.scores(), sparsity.scores() if sparsity else None)


def _check_dictionary(dictionary: Dictionary, cache: ActivationCache, hook: str) -> None:
    trained_on = dictionary.metadata.get("hook")
    if trained_on is not None and trained_on != hook:
        raise ConfigError(
            f"hook {hook!r}: the dictionary was trained on {trained_on!r}; evaluate it there, with a cache that has it"
        )
    trained_model = dictionary.metadata.get("model") or {}
    for key in ("weights_sha256", "weight_processing"):
        if key in trained_model and trained_model[key] != cache.manifest.model.get(key):
            raise CacheError(
                f"cache {str(cache.path)!r}: of another model than the dictionary's: {key} is "
                f"{cache.manifest.model.get(key)!r} there and {trained_model[key]!r} in training: harvest with that one"
            )
    if cache.d_in(hook) != dictionary.d_in:
        raise ConfigError(
            f"hook {hook!r}: activations have {cache.d_in(hook):,} numbers, the dictionary takes {dictionary.d_in:,}; "
            "give the hook point and the model it was trained on"
        )
    for name, parameter in dictionary.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise FormatError(
                f"dictionary: {name} has values that are infinite or not a number; take an earlier checkpoint, or "
                "train again"
            )


def _on(dictionary: Dictionary, device: str | torch.device) -> Dictionary:
    here = dictionary.W_dec.device == torch.empty(0, device=device).device
    return dictionary if here else copy.deepcopy(dictionary).to(device)


def _describe(dictionary: Dictionary) -> str:
    settings = "".join(f", {key} = {value}" for key, value in dictionary.settings().items())
    return f"dictionary: {dictionary.architecture}, {dictionary.d_in:,} → {dictionary.d_sae:,}{settings}"


def _dead_in_training(dictionary: Dictionary) -> dict[str, Any] | None:
    """What training counted, where it was long enough for a feature to count as dead."""
    trained = dictionary.metadata.get("trained", {})
    if (
        not {"dead", "dead_after_tokens", "tokens"} <= trained.keys()
        or trained["tokens"] < trained["dead_after_tokens"]
    ):
        return None
    return {"features": trained["dead"], "tokens": trained["dead_after_tokens"]}


def _unchanged(x: Tensor) -> Tensor:
    return x


def _silent(stage: str, done: int, of: int) -> None:
    return None
