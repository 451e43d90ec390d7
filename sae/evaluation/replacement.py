"""Losses of the language model with modules replaced by transcoders, all together and one at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.activations.cache import ActivationCache, ContextBatch
from sae.activations.same_model import check_same_model
from sae.config.progress import Progress, silent
from sae.config.settings import EvaluationConfig
from sae.config.splits import HELD_OUT
from sae.dictionary.base import Dictionary
from sae.dictionary.saved import identify
from sae.errors import ModelError
from sae.evaluation.budget import check_losses, losses_read, settled, spread_contexts
from sae.evaluation.losses import CleanPass, at_eligible
from sae.evaluation.partial import Unfinished
from sae.evaluation.stand_ins import (
    KINDS,
    MEAN,
    Module,
    StandIns,
    fit_bytes,
    fit_stand_ins,
    groups_to_fit,
    modules_of,
    together,
    tokens_to_fit,
)
from sae.files import version
from sae.files.formats import HEAD, Format, as_read_back
from sae.files.kept import KeptResult
from sae.model.language_model import LanguageModel
from sae.model.tail import Replacement, same_logits
from sae.numerics.modes import in_own_modes
from sae.results.estimate import TOKENS, DocumentSums, Estimate, ratio

MARKDOWN_FILE = "replacement.md"
REPLACEMENT = KeptResult(Format("sae-replacement", 1), "replacement.json", (MARKDOWN_FILE,), of_version=False)
"""Its key has the version."""
ALL = "all"
_CLEAN = "clean"


@dataclass(frozen=True)
class ReplacementLosses:
    """Nats per token over every eligible position with a next token, as in an evaluation; differences are paired.

    Attributes:
        ce: next-token loss.
        delta_ce: its difference to the clean loss.
        kl: KL(clean ‖ replaced) of the next-token distributions.
        ce_recovered: (mean − this) / (mean − clean), with the means of the same modules: 1 loses nothing, 0 is as bad
            as means.
    """

    ce: Estimate
    delta_ce: Estimate
    kl: Estimate
    ce_recovered: Estimate

    def to_json(self) -> dict[str, Any]:
        return {name: estimate.to_json() for name, estimate in vars(self).items()}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> ReplacementLosses:
        return ReplacementLosses(**{name: Estimate.from_json(estimate) for name, estimate in record.items()})


ByKind = Mapping[str, ReplacementLosses]


@dataclass(frozen=True)
class ReplacedModule:
    """A module, and the losses if it alone is replaced.

    Attributes:
        reads, gives: its hook points.
        transcoder: name of the transcoder.
        dictionary: identity of the transcoder: architecture, shape, settings and a hash of the weights.
        losses: by what replaces it; empty if it is the only module.
    """

    reads: str
    gives: str
    transcoder: str
    dictionary: dict[str, Any]
    losses: ByKind = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "losses": _to_json(self.losses)}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> ReplacedModule:
        return ReplacedModule(**{**record, "losses": _from_json(record["losses"])})


@dataclass(frozen=True)
class ReplacementReport:
    """The result of `measure_replacement`.

    The keys of losses are `dictionary`: the transcoder; `skip`: its skip connection alone, with the best constant;
    `linear`: the best affine map; `mean`: the mean of the module's output; `zero`.

    Attributes:
        key: everything that determines it: hashes of weights and activations, settings, package version.
        model, data: where the text comes from.
        token_policy: which tokens count.
        tokens: number of positions with a loss.
        documents: number of documents that they come from.
        fitted_tokens: number of training tokens that means and affine maps are fitted on.
        ce_clean: next-token loss with nothing replaced.
        together: losses with all modules replaced, each reading what the others have changed. There is no `skip` unless
            all transcoders have one.
        modules: in the order in which the model computes them.
        seconds: how long it took.
    """

    key: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    token_policy: dict[str, Any]
    tokens: int
    documents: int
    fitted_tokens: int
    ce_clean: Estimate
    together: ByKind
    modules: tuple[ReplacedModule, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The content of `replacement.json`."""
        parts = {
            "ce_clean": self.ce_clean.to_json(),
            "together": _to_json(self.together),
            "modules": [module.to_json() for module in self.modules],
            "seconds": round(self.seconds, 3),
        }
        return REPLACEMENT.headed({**vars(self), **parts})

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> ReplacementReport:
        """The inverse of `to_json`."""
        parts = {
            "ce_clean": Estimate.from_json(record["ce_clean"]),
            "together": _from_json(record["together"]),
            "modules": tuple(ReplacedModule.from_json(module) for module in record["modules"]),
        }
        rest = {name: value for name, value in record.items() if name not in HEAD}
        return ReplacementReport(**{**rest, **parts})


def _to_json(losses: ByKind) -> dict[str, Any]:
    return {kind: entry.to_json() for kind, entry in losses.items()}


def _from_json(record: Mapping[str, Any]) -> dict[str, ReplacementLosses]:
    return {kind: ReplacementLosses.from_json(entry) for kind, entry in record.items()}


@torch.no_grad()
@in_own_modes
def measure_replacement(
    dictionaries: Mapping[str, Dictionary],
    cache: ActivationCache,
    language_model: LanguageModel,
    *,
    settings: EvaluationConfig | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    unfinished: Path | None = None,
) -> ReplacementReport:
    """Losses on held-out text with modules replaced by transcoders, all together and one at a time.

    The same is measured with what needs no features in their place: the transcoders' skip connections alone, the best
    affine maps from what each reads, the means of the modules' outputs, and 0. If all are replaced together, each
    transcoder reads the activation that the replaced model computes. Tokens that the cache's token policy leaves out
    are never replaced. It is proved on the model that putting back the modules' own outputs changes nothing.

    Args:
        dictionaries: transcoders by any names, each for another module of the model.
        cache: its held-out tokens are read, and its training tokens for means and affine maps; it need not have the
            hook points.
        language_model: the model that the cache was made with.
        settings: `downstream_tokens` and `tokens` say how many tokens are read, `batch_contexts` how many contexts at a
            time.
        device: where transcoders are computed; the language model stays where it is.
        progress: called with (stage, tokens done, total).
        unfinished: folder for running sums, so that the same measurement continues after an interruption; see
            `evaluate_all`.

    Raises:
        CacheError: the cache is of another model.
        ConfigError: a dictionary is no transcoder, or does not belong here; two give the same hook point; too few
            tokens.
        ModelError: a transcoder is of another model, or a hook point cannot be replaced exactly.
    """
    started, report = time.perf_counter(), progress or silent
    modules = modules_of(dictionaries, language_model)
    check_same_model(cache, language_model)
    for module in modules:
        language_model.tail(module.gives)  # proved before anything is read
    requested = settings or EvaluationConfig()
    settings = settled(requested, cache)
    key = replacement_key({module.name: module.dictionary for module in modules}, cache, requested)
    devices = [str(torch.device(device)), str(language_model.device)]
    stored = Unfinished(unfinished, {**key, "language_model": language_model.info.to_json(), "devices": devices})
    stand_ins = fit_stand_ins(modules, cache, language_model, torch.device(device), report)
    sums = DocumentSums(len(cache.documents(HELD_OUT)), [_CLEAN, *_columns(stand_ins)])
    stage = stored.stage("language model", {"sums": sums})
    batches = [batch for batch, _ in spread_contexts(cache, settings)]
    done, total = sum(batch.tokens.numel() for batch in batches[: stage.done]), losses_read(settings, cache)
    report("language model", done, total)
    for step, batch in enumerate(batches[stage.done :], stage.done + 1):
        counted = batch.eligible[:, :-1]
        if counted.any():
            values = _measure_batch(language_model, stand_ins, batch, check=not sums.tokens)
            rows = {name: column[counted.flatten()] for name, column in values.items()}
            sums.add_(batch.documents[:, :-1][counted], rows)
        done += batch.tokens.numel()
        stage.step(step)
        report("language model", done, total)
    stage.keep()
    check_losses(sums.tokens, cache, settings)
    alone = len(modules) > 1
    return ReplacementReport(
        key=key,
        model=cache.manifest.model,
        data=cache.manifest.data,
        token_policy=cache.policy.to_json(),
        tokens=sums.tokens,
        documents=sums.documents,
        fitted_tokens=stand_ins[0].fitted_tokens,
        ce_clean=sums.mean(_CLEAN),
        together={kind: _losses(sums, ALL, kind) for kind in _common_kinds(stand_ins)},
        modules=tuple(
            ReplacedModule(
                entry.module.reads, entry.module.gives, entry.module.name, identify(entry.module.dictionary),
                {kind: _losses(sums, entry.module.gives, kind) for kind in entry.functions} if alone else {},
            )
            for entry in stand_ins
        ),
        seconds=time.perf_counter() - started,
    )  # fmt: skip


def replacement_key(
    dictionaries: Mapping[str, Dictionary], cache: ActivationCache, settings: EvaluationConfig
) -> dict[str, Any]:
    """Everything that determines a report's numbers; keys are equal only if the numbers are."""
    facts = {
        "sae_version": version.__version__,
        "dictionaries": sorted(
            [str(dictionary.origin.gives), name, identify(dictionary)] for name, dictionary in dictionaries.items()
        ),
        "activations": cache.manifest.identity(cache.hooks[0]),
        "rows": cache.manifest.rows,
        "settings": settings.model_dump(mode="json"),
    }
    return as_read_back(facts)


def replacement_cost(
    modules: Sequence[Dictionary], cache: ActivationCache, settings: EvaluationConfig,
    device: str | torch.device = "cpu",
) -> str:  # fmt: skip
    """The cost of a report: tokens that pass through the language model once, and memory for affine maps."""
    chosen = settled(settings, cache)
    tokens = losses_read(chosen, cache)
    entries = [
        Module("", dictionary, str(dictionary.origin.reads), str(dictionary.origin.gives)) for dictionary in modules
    ]
    fitted, groups = tokens_to_fit(entries, cache), groups_to_fit(entries, torch.device(device))
    kinds = [len(KINDS) - (dictionary.W_skip is None) for dictionary in modules]
    alone = sum(kinds) + len(modules) if len(modules) > 1 else 0
    passes = (2 + min(kinds) + alone) * tokens + len(groups) * fitted
    memory = max(map(fit_bytes, groups)) / 1e9
    return (
        f"replacement of {len(modules)} modules: {tokens:,} held-out tokens for losses, {fitted:,} training tokens for "
        f"affine maps: language-model passes over at most {passes:,} tokens; sums of the maps take {memory:.1f} GB"
    )


def _common_kinds(stand_ins: Sequence[StandIns]) -> list[str]:
    """Kinds that every module has."""
    return [kind for kind in KINDS if all(kind in entry.functions for entry in stand_ins)]


def _columns(stand_ins: Sequence[StandIns]) -> Iterator[str]:
    """The columns of sums: losses and divergences by place and kind."""
    places = {ALL: _common_kinds(stand_ins)}
    if len(stand_ins) > 1:
        places |= {entry.module.gives: list(entry.functions) for entry in stand_ins}
    for place, kinds in places.items():
        for kind in kinds:
            yield from (_ce(place, kind), _kl(place, kind))


def _measure_batch(
    language_model: LanguageModel, stand_ins: Sequence[StandIns], batch: ContextBatch, *, check: bool
) -> dict[str, Tensor]:
    """Numbers of each position with a next token, by column; `check` proves that the own outputs change nothing."""
    tokens, eligible = batch.tokens.to(language_model.device), batch.eligible.to(language_model.device)
    own = language_model.logits(tokens)
    if check:
        with together(language_model, stand_ins, None, eligible):
            _check_same(language_model, stand_ins, language_model.logits(tokens), own)
    clean = CleanPass.of(own, tokens)
    values = {_CLEAN: clean.losses()}
    for kind in _common_kinds(stand_ins):
        with together(language_model, stand_ins, kind, eligible):
            logits = language_model.logits(tokens)
        values[_ce(ALL, kind)], values[_kl(ALL, kind)] = clean.compared(logits)
    if len(stand_ins) == 1:
        return values
    reads = sorted({entry.module.reads for entry in stand_ins})
    rows = {name: x[eligible] for name, x in language_model.activations(tokens, reads).items()}
    for entry in stand_ins:
        x, place = rows[entry.module.reads], entry.module.gives
        replacements = [at_eligible(eligible, _computed(entry, kind, x)) for kind in entry.functions]
        for kind, logits in zip(
            entry.functions, language_model.replaced_logits(tokens, place, replacements), strict=True
        ):
            values[_ce(place, kind)], values[_kl(place, kind)] = clean.compared(logits)
    return values


def _computed(entry: StandIns, kind: str, x: Tensor) -> Replacement:
    """A replacement that is computed from what the module reads, whatever its output is."""
    return lambda _: entry(kind, x)


def _check_same(
    language_model: LanguageModel, stand_ins: Sequence[StandIns], logits: Tensor, own: Tensor
) -> None:  # fmt: skip
    if not same_logits(language_model, logits, own):
        hooks = ", ".join(entry.module.gives for entry in stand_ins)
        raise ModelError(
            f"hooks {hooks}: putting back their own activations together changes the logits of "
            f"{language_model.info.name}, so measurements there would be of another model; replace them one at a time"
        )


def _losses(sums: DocumentSums, place: str, kind: str) -> ReplacementLosses:
    ce, clean, mean, tokens = sums[_ce(place, kind)], sums[_CLEAN], sums[_ce(place, MEAN)], sums[TOKENS]
    return ReplacementLosses(
        ratio(ce, tokens), ratio(ce - clean, tokens), ratio(sums[_kl(place, kind)], tokens),
        ratio(mean - ce, mean - clean),
    )  # fmt: skip


def _ce(place: str, kind: str) -> str:
    return f"ce {place} {kind}"


def _kl(place: str, kind: str) -> str:
    return f"kl {place} {kind}"
