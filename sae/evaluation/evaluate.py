"""Dictionaries and cache in, a `Report` of each out: every metric of the dictionary and of its baselines."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from sae.activations.cache import ActivationCache
from sae.activations.harvest import check_same_model
from sae.config import EvaluationConfig
from sae.dictionary import Dictionary
from sae.errors import CacheError, ConfigError, FormatError
from sae.evaluation.baselines import IDENTITY, Baseline, fit_baselines
from sae.evaluation.downstream import measure_downstream
from sae.evaluation.reconstruction import ReconstructionSums, Reconstructor, from_dictionary
from sae.evaluation.report import Report, Scores, identify
from sae.evaluation.sparsity import SparsityCounts
from sae.evaluation.streams import ActivationSummary, Progress, held_out_blocks, summarise
from sae.language_model import LanguageModel
from sae.tokens import TokenPolicy
from sae.transcoding import Hooks


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

    A transcoder (`target_hook` in its metadata) is evaluated at the hook point that it gives, from the activations at
    the one that it reads, both of the cache.

    Only tokens that the cache's token policy leaves are evaluated. Everything is streamed, summed per document in
    float64, and independent of `settings.batch_contexts`.

    Args:
        dictionary: takes raw activations; it is not changed, and copied where it is not on `device`.
        cache: the activations; baselines are fitted on its training split.
        hook: hook point, one of the cache's; of a transcoder the one whose activations it gives.
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
    reports = evaluate_all(
        {"dictionary": dictionary}, cache,
        hook=hook, language_model=language_model, settings=settings, device=device, progress=progress,
    )  # fmt: skip
    return reports["dictionary"]


@torch.no_grad()
def evaluate_all(
    dictionaries: Mapping[str, Dictionary],
    cache: ActivationCache,
    *,
    hook: str,
    language_model: LanguageModel | None = None,
    settings: EvaluationConfig | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> dict[str, Report]:
    """`evaluate` for several dictionaries at one hook point, at less than what they cost one by one.

    Activations are read once for all, the model runs once up to the hook point and once on from it for each thing put
    there: clean, zero and mean losses are common, and baselines too where dictionaries are of one size.

    Args:
        dictionaries: by whatever names; the other arguments are those of `evaluate`, and so are the errors.

    Returns:
        By the same names, the reports that `evaluate` gives of each; `seconds` is the time that all of them took.

    Raises:
        ConfigError: there is no dictionary.
    """
    started = time.perf_counter()
    settings, report_progress = settings or EvaluationConfig(), progress or _silent
    if not dictionaries:
        raise ConfigError("there is no dictionary to evaluate; give at least one")
    for name, dictionary in dictionaries.items():
        _check_dictionary(name, dictionary, cache, hook)
    if language_model is not None:
        check_same_model(cache.path, cache.manifest, language_model)
        probe = torch.zeros(1, 2, dtype=torch.long, device=language_model.device)
        next(iter(language_model.replaced_logits(probe, hook, [_unchanged])))
    summary = summarise(cache, hook, settings, report_progress)

    def score(stage: str, reconstructors: Mapping[Any, Reconstructor]) -> dict[Hashable, Scores]:
        return _score(
            reconstructors, cache, hook, settings,
            summary=summary, progress=lambda *done: report_progress(stage, *done), device=device,
        )  # fmt: skip

    own = {
        name: from_dictionary(_on(dictionary, device), _describe(dictionary), _reads(dictionary))
        for name, dictionary in dictionaries.items()
    }
    scores = score("reconstruction", own)
    columns = {name: _baselines_of(dictionary, scores[name]) for name, dictionary in dictionaries.items()}
    wanted = dict.fromkeys(baseline for chosen in columns.values() for baseline in chosen.values())
    baselines = fit_baselines(wanted, cache, hook, device, report_progress)
    scores |= score("baselines", baselines)
    if language_model is not None:
        downstream = measure_downstream(
            language_model, cache, hook, own, baselines,
            mean=summary.mean, settings=settings, device=device, progress=report_progress,
        )  # fmt: skip
        scores = {key: part.with_downstream(downstream[key]) for key, part in scores.items()}
    seconds = time.perf_counter() - started

    def report(name: str, dictionary: Dictionary) -> Report:
        trained_with = dictionary.metadata.get("tokens")
        return Report(
            dictionary=identify(dictionary) | ({"reads": _reads(dictionary)} if _reads(dictionary) else {}),
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
            scores=scores[name],
            baselines={column: scores[key] for column, key in columns[name].items()},
            dead_in_training=_dead_in_training(dictionary),
            norms=summary.norms,
            seconds=seconds,
        )

    return {name: report(name, dictionary) for name, dictionary in dictionaries.items()}


def _baselines_of(dictionary: Dictionary, scores: Scores) -> dict[str, Baseline]:
    """What a dictionary is compared with, by column; dictionaries of one size have the same."""
    k = baseline_size(dictionary, scores)
    return {"pca": Baseline("pca", k), "random": Baseline("random", k, dictionary.d_sae), "identity": IDENTITY}


def baseline_size(dictionary: Dictionary, scores: Scores) -> int:
    """Components and features given to the baselines: the dictionary's k, or its mean L0 rounded where it has no k."""
    assert scores.sparsity is not None
    return max(1, int(dictionary.settings().get("k", round(scores.sparsity.l0.value or 0))))


def _score(
    reconstructors: Mapping[Any, Reconstructor], cache: ActivationCache, hook: str, settings: EvaluationConfig, *,
    summary: ActivationSummary, progress: Callable[[int, int], None], device: str | torch.device,
) -> dict[Hashable, Scores]:  # fmt: skip
    """One pass over the held-out tokens."""
    sums = {key: ReconstructionSums(summary.all_documents, summary.mean) for key in reconstructors}
    sparsity = {
        key: SparsityCounts(summary.all_documents, reconstructor.features)
        for key, reconstructor in reconstructors.items()
        if reconstructor.features
    }
    done = 0
    others = sorted({reconstructor.reads for reconstructor in reconstructors.values() if reconstructor.reads})
    for block in held_out_blocks(cache, hook, settings, others):
        x = block.x.to(device)
        for key, reconstructor in reconstructors.items():
            result = reconstructor(block.others[reconstructor.reads].to(device) if reconstructor.reads else x)
            sums[key].add_(x, result.x_hat, block.documents)
            if key in sparsity and result.codes is not None:
                sparsity[key].add_(result.codes, block.documents)
        done += len(x)
        progress(done, summary.tokens)
    return {
        key: Scores(made.description, sums[key].scores(), sparsity[key].scores() if key in sparsity else None)
        for key, made in reconstructors.items()
    }


def _check_dictionary(name: str, dictionary: Dictionary, cache: ActivationCache, hook: str) -> None:
    hooks = Hooks.of(dictionary.metadata)
    if hooks.gives is not None and hooks.gives != hook:
        does = "gives activations of" if hooks.of_transcoder else "was trained on"
        raise ConfigError(
            f"hook {hook!r}: the dictionary {does} {hooks.gives!r}; evaluate it there, with a cache that has it"
        )
    trained_model = dictionary.metadata.get("model") or {}
    for key in ("weights_sha256", "weight_processing"):
        if key in trained_model and trained_model[key] != cache.manifest.model.get(key):
            raise CacheError(
                f"cache {str(cache.path)!r}: of another model than the dictionary's: {key} is "
                f"{cache.manifest.model.get(key)!r} there and {trained_model[key]!r} in training: harvest with that one"
            )
    for place in dict.fromkeys((hook, _reads(dictionary) or hook)):
        if cache.d_in(place) != dictionary.d_in:
            raise ConfigError(
                f"hook {place!r}: activations have {cache.d_in(place):,} numbers, the dictionary takes "
                f"{dictionary.d_in:,}; give the hook point and the model it was trained on"
            )
    for part, parameter in dictionary.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise FormatError(
                f"{name}: {part} has values that are infinite or not a number; take an earlier checkpoint, or "
                "train again"
            )


def _on(dictionary: Dictionary, device: str | torch.device) -> Dictionary:
    here = dictionary.W_dec.device == torch.empty(0, device=device).device
    return dictionary if here else copy.deepcopy(dictionary).to(device)


def _describe(dictionary: Dictionary) -> str:
    settings = "".join(f", {key} = {value}" for key, value in dictionary.settings().items())
    shape = f"{dictionary.d_in:,} → {dictionary.d_sae:,}"
    elsewhere = f", from {_reads(dictionary)}" if _reads(dictionary) else ""
    return f"dictionary: {dictionary.architecture}, {shape}{settings}{elsewhere}"


def _reads(dictionary: Dictionary) -> str | None:
    """The hook point that a transcoder reads; None where a dictionary reads what it gives."""
    hooks = Hooks.of(dictionary.metadata)
    return hooks.reads if hooks.of_transcoder else None


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
