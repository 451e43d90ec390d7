"""Evaluation of dictionaries on a cache: a `Report` for each, with every metric of it and of its baselines."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sae.activations.cache import ActivationCache
from sae.activations.metadata import common_hook
from sae.activations.same_model import check_same_model
from sae.architectures import ARCHITECTURES
from sae.config.progress import Progress, silent, within
from sae.config.settings import EvaluationConfig
from sae.dictionary.origin import dead_in_training
from sae.dictionary.published import Published
from sae.dictionary.token_policy import TokenPolicy
from sae.errors import ConfigError
from sae.evaluation.baselines import IDENTITY, Baseline, fit_baselines
from sae.evaluation.budget import settled, settled_tokens
from sae.evaluation.candidate import Candidate, Evaluated, candidate
from sae.evaluation.downstream import measure_downstream
from sae.evaluation.frozen_decoder import train_frozen_decoders
from sae.evaluation.held_out import BLOCK_TOKENS, ActivationSummary, HeldOut, held_out_blocks, summarise
from sae.evaluation.partial import Unfinished
from sae.evaluation.published import PublishedScores, measure_published
from sae.evaluation.reconstruction import ReconstructionSums, Reconstructor, Truth
from sae.evaluation.report import HEADINGS, Report, Scores
from sae.evaluation.sparsity import SparsityCounts
from sae.model.language_model import LanguageModel
from sae.model.tail import NO_ROAD, Road
from sae.numerics.modes import in_own_modes


def evaluate(
    dictionary: Evaluated,
    cache: ActivationCache,
    *,
    hook: str | None = None,
    language_model: LanguageModel | None = None,
    settings: EvaluationConfig | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Report:
    """Score a dictionary, PCA, a random dictionary, a frozen decoder and the identity on a cache's held-out tokens.

    A transcoder is evaluated at the hook point that it gives, from the activations at the one that it reads, both of
    the cache. Its baselines are the best affine map from what it reads, and PCA of its target; that of a dictionary
    with a skip connection is this alone.

    Only tokens that the cache's token policy keeps are evaluated. Everything is streamed, summed per document in
    float64, and independent of `settings.batch_contexts`.

    Args:
        dictionary: takes raw activations; it is not changed, and copied if it is not on `device`. Or any object
            whose `encode` gives dense features `[rows, d_sae]` of them and whose `decode` gives reconstructions; it is
            used where it is, and baselines get as many features as it fires.
        cache: the activations; baselines are fitted on its training split.
        hook: hook point, one of the cache's; for a transcoder, the one whose activations it gives. None: the one the
            dictionary was trained on, or the cache's only one.
        language_model: the model that the cache was made with; None: no language-model losses. There are none either if
            the hook point can be read but not replaced; the report then says so.
        settings: how many tokens, and how many contexts at a time.
        device: where reconstructions are computed; the language model stays where it is.
        progress: called with (stage, tokens done, total).

    Raises:
        CacheError: the hook point is not in the cache, activations are not finite, or the language model differs.
        ConfigError: the dictionary was trained on another hook point or has another width; too few tokens.
        FormatError: the dictionary's weights are not finite.
        ModelError: the model has no such hook point.
        TrainingInterrupted: Ctrl-C while the frozen decoder is trained; nothing is kept.
    """
    reports = evaluate_all(
        {"dictionary": dictionary}, cache,
        hook=hook, language_model=language_model, settings=settings, device=device, progress=progress,
    )  # fmt: skip
    return reports["dictionary"]


@torch.no_grad()
@in_own_modes
def evaluate_all(
    dictionaries: Mapping[str, Evaluated],
    cache: ActivationCache,
    *,
    hook: str | None = None,
    language_model: LanguageModel | None = None,
    settings: EvaluationConfig | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    unfinished: Path | None = None,
) -> dict[str, Report]:
    """`evaluate` for several dictionaries at one hook point, at less cost than one by one.

    Activations are read once for all. The model runs once up to the hook point, and once from there for each
    replacement: clean, zero and mean losses are shared, and so are baselines of dictionaries of one size.

    Args:
        dictionaries: by any names; the other arguments and the errors are those of `evaluate`.
        unfinished: folder for running sums, so that the same evaluation continues after an interruption, with the same
            result to the last bit on a CPU. Delete it when the reports are written. None: nothing is stored,
            nor is it if a dictionary has no hash of its weights.

    Returns:
        The reports of `evaluate`, by the same names; `seconds` is the time for all of them together.

    Raises:
        ConfigError: there is no dictionary.
    """
    started, requested = time.perf_counter(), settings or EvaluationConfig()
    if not dictionaries:
        raise ConfigError("there is no dictionary to evaluate; give at least one")
    hook = hook or common_hook(dictionaries, cache)
    candidates = {name: candidate(name, entry, cache, hook, device) for name, entry in dictionaries.items()}
    road = None
    if language_model is not None:
        check_same_model(cache, language_model, hook)
        road = language_model.road(hook)  # proved before anything is read
        language_model = None if road.name == NO_ROAD else language_model
    held_out = HeldOut(cache, hook, settled(requested, cache), language_model, device, progress or silent)
    held_out = replace(held_out, unfinished=_unfinished(unfinished, candidates, held_out, road))
    settings, summary = held_out.settings, summarise(held_out)
    reconstructors = {name: entry.reconstructor for name, entry in candidates.items()}
    scores = _score(held_out, summary, "reconstruction", reconstructors)
    columns = {name: _baselines_for(name, entry, scores[name], settings) for name, entry in candidates.items()}
    distinct_baselines = dict.fromkeys(baseline for chosen in columns.values() for baseline in chosen.values())
    skips = {name: entry.skip for name, entry in candidates.items() if entry.skip is not None}
    baselines = fit_baselines(distinct_baselines, held_out, skips)
    frozen = [baseline for baseline in distinct_baselines if baseline.kind == "frozen_decoder"]
    baselines |= train_frozen_decoders(frozen, held_out, settled_tokens(settings.frozen_decoder_tokens) or 0)
    baseline_tokens = settled_tokens(settings.baseline_reconstruction_tokens) or summary.tokens
    scores |= _score(held_out, summary, "baselines", baselines, every=-(-summary.tokens // baseline_tokens))
    if language_model is not None:
        downstream = measure_downstream(held_out, reconstructors, baselines, summary.mean)
        scores = {key: part.with_downstream(downstream[key]) for key, part in scores.items()}
    autoencoders = {name: entry for name, entry in reconstructors.items() if not entry.reads}
    legacy = measure_published(held_out, autoencoders, summary.mean)
    seconds = time.perf_counter() - started
    return {
        name: _report(
            entry, held_out, requested, summary,
            scores=scores[name], baselines={column: scores[key] for column, key in columns[name].items()},
            legacy=legacy.get(name), seconds=seconds, road=road,
        )
        for name, entry in candidates.items()
    }  # fmt: skip


def _unfinished(
    folder: Path | None, candidates: Mapping[str, Candidate], held_out: HeldOut, road: Road | None
) -> Unfinished:
    """The sums stored for this evaluation, if everything that determines it is the same."""
    cache, language_model = held_out.cache, held_out.language_model
    all_hashed = all(entry.identity["weights_sha256"] for entry in candidates.values())
    facts = {
        "dictionaries": [[name, entry.identity] for name, entry in candidates.items()],
        "activations": cache.manifest.identity(held_out.hook),
        "rows": cache.manifest.rows,
        "hook": held_out.hook,
        "settings": held_out.settings.model_dump(mode="json"),
        "language_model": None if language_model is None else language_model.info.to_json(),
        "road": None if road is None else str(road),
        "baselines": list(HEADINGS),
        "devices": [str(held_out.device), None if language_model is None else str(language_model.device)],
    }
    return Unfinished(folder if all_hashed else None, facts)


def _report(
    subject: Candidate, held_out: HeldOut, settings: EvaluationConfig, summary: ActivationSummary, *, scores: Scores,
    baselines: dict[str, Scores], legacy: PublishedScores | None, seconds: float, road: Road | None,
) -> Report:  # fmt: skip
    cache = held_out.cache
    trained_with = subject.metadata.get("tokens")
    return Report(
        dictionary=subject.identity,
        hook=held_out.hook,
        model=cache.manifest.model,
        data=cache.manifest.data,
        activations=cache.manifest.identity(held_out.hook),
        settings=settings,
        policy=cache.policy,
        training_policy=TokenPolicy.from_json(trained_with) if trained_with else None,
        tokens=summary.tokens,
        masked=summary.masked,
        documents=summary.documents,
        scores=scores,
        baselines=baselines,
        legacy=legacy,
        dead_in_training=dead_in_training(subject.metadata),
        norms=summary.norms,
        seconds=seconds,
        road=road,
        published=Published.of(subject.metadata),
    )


def _baselines_for(
    name: str, subject: Candidate, scores: Scores, settings: EvaluationConfig
) -> dict[str, Baseline]:  # fmt: skip
    """The baselines of a dictionary, by column; dictionaries of one size have the same, except for their skips.

    A random dictionary and a frozen decoder would read what a transcoder has to predict.
    """
    k, reads = baseline_size(subject, scores), subject.reconstructor.reads
    chosen = {"pca": Baseline("pca", k)}
    chosen |= {"random": Baseline("random", k, subject.d_sae)} if reads is None else {}
    chosen |= {"linear": Baseline("linear", reads=reads)} if reads is not None else {}
    chosen |= {"skip": Baseline("skip", reads=reads, dictionary=name)} if subject.skip is not None else {}
    if settings.frozen_decoder_tokens and reads is None:
        is_known = subject.architecture in ARCHITECTURES
        architecture = subject.architecture if is_known and subject.architecture else "topk"
        prefixes = tuple(subject.settings.get("prefixes", ())) if is_known else ()
        chosen["frozen_decoder"] = Baseline("frozen_decoder", k, subject.d_sae, architecture, prefixes)
    return chosen | {"identity": IDENTITY}


def baseline_size(made: Candidate, scores: Scores) -> int:
    """Components and features given to the baselines: the dictionary's k, or its rounded mean L0 if it has no k."""
    assert scores.sparsity is not None
    return max(1, int(made.settings.get("k", round(scores.sparsity.l0.value or 0))))


def _score(
    held_out: HeldOut, summary: ActivationSummary, stage: str, reconstructors: Mapping[Any, Reconstructor],
    every: int = 1,
) -> dict[Hashable, Scores]:  # fmt: skip
    """Scores from one pass over the held-out tokens, or over every n-th of them."""
    device, progress = held_out.device, within(held_out.progress, stage)
    sums = {key: ReconstructionSums(summary.all_documents) for key in reconstructors}
    sparsity = {
        key: SparsityCounts(summary.all_documents, reconstructor.features)
        for key, reconstructor in reconstructors.items()
        if reconstructor.features
    }
    places = {key: str(place) for place, key in enumerate(reconstructors)}
    stages = held_out.unfinished.stage(
        stage,
        {
            **{f"reconstruction {places[key]}": part.sums for key, part in sums.items()},
            **{f"sparsity {places[key]}": part for key, part in sparsity.items()},
        },
    )
    done = min(stages.done * BLOCK_TOKENS, summary.tokens)
    progress(done, summary.tokens)
    others = sorted({reconstructor.reads for reconstructor in reconstructors.values() if reconstructor.reads})
    for step, block in enumerate(held_out_blocks(held_out, others), 1):
        if step <= stages.done:
            continue
        rows = slice(-done % every, None, every)
        x, documents = block.x[rows].to(device), block.documents[rows]
        truth = Truth.of(x, summary.mean)
        for key, reconstructor in reconstructors.items() if len(x) else ():
            result = reconstructor(block.others[reconstructor.reads][rows].to(device) if reconstructor.reads else x)
            sums[key].add_(truth, result.x_hat, documents)
            if key in sparsity and result.codes is not None:
                sparsity[key].add_(result.codes, documents)
        done += len(block.x)
        stages.step(step)
        progress(done, summary.tokens)
    stages.keep()
    return {
        key: Scores(
            reconstructor.description,
            sums[key].sums.tokens,
            sums[key].scores(),
            sparsity[key].scores() if key in sparsity else None,
        )
        for key, reconstructor in reconstructors.items()
    }
