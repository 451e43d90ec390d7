"""Several dictionaries on the same held-out tokens: every metric, and its paired difference to the first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from sae.activations.cache import ActivationCache
from sae.config.progress import Progress
from sae.config.settings import EvaluationConfig
from sae.dictionary.published import PUBLISHED, Published
from sae.errors import ConfigError
from sae.evaluation.candidate import Evaluated
from sae.evaluation.metrics import METRICS, Totals, below_noise, difference
from sae.evaluation.report import fewest_of_baselines
from sae.evaluation.scoring import evaluate_all
from sae.files import version
from sae.files.formats import HEAD, Format, as_read_back
from sae.files.kept import KeptResult
from sae.model.language_model import LanguageModel
from sae.numerics.modes import in_own_modes
from sae.results.estimate import Estimate

NEAR_L0 = 1.1
"""Of baselines that differ only in L0, by no more than this factor, one is shown."""
COMPARISON_TEXT = "compare.md"
COMPARISON = KeptResult(Format("sae-comparison", 2), "compare.json", (COMPARISON_TEXT,), of_version=False)
"""Its key has the version."""


@dataclass(frozen=True)
class Compared:
    """A dictionary, or a baseline, in a comparison or in a stored report.

    Attributes:
        description: what it is, in a line.
        metrics: those measured, by the names of their definitions.
        features: number of features; 0 if it has none.
        dead: those that never fired; dense: those that fired on more than a tenth of the tokens. None without features.
        differences: to the first dictionary, with standard errors paired over documents; for dictionaries only.
        published: numbers that others published with it; None if it comes without any.
    """

    description: str
    metrics: dict[str, Estimate]
    features: int
    dead: int | None
    dense: int | None
    differences: dict[str, Estimate] = field(default_factory=dict)
    published: Published | None = None

    def to_json(self) -> dict[str, Any]:
        differences = {
            name: {**estimate.to_json(), "below_noise": below_noise(estimate)}
            for name, estimate in self.differences.items()
        }
        metrics = {name: estimate.to_json() for name, estimate in self.metrics.items()}
        published = None if self.published is None else self.published.to_json()
        return {**asdict(self), "metrics": metrics, "differences": differences, PUBLISHED: published}

    @staticmethod
    def of(record: Mapping[str, Any], differences: dict[str, Estimate] | None = None) -> Compared:
        """From the content of `eval.json`, or from one of its baselines."""
        metrics = {name: value for name, value in record.items() if name in METRICS and value is not None}
        dead, dense = record.get("dead"), record.get("dense")
        return Compared(
            description=record["description"],
            metrics={name: Estimate.from_json(estimate) for name, estimate in metrics.items()},
            features=record.get("features") or 0,
            dead=dead["features"] if dead else None,
            dense=dense["features"] if dense else None,
            differences=differences or {},
            published=Published.of(record),
        )

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Compared:
        estimates = {
            part: {name: Estimate.from_json(estimate) for name, estimate in record[part].items()}
            for part in ("metrics", "differences")
        }
        return Compared(**{**record, **estimates, PUBLISHED: Published.of(record)})


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`.

    Attributes:
        key: everything that determines it: hashes of weights and activations, hook point, settings, package version.
        hook, model, data: where the activations come from.
        token_policy: which tokens count.
        evaluated: numbers of tokens and documents, by the names in `eval.json`; `baseline_tokens` and
            `baseline_positions` are the smallest numbers that a baseline, and its losses, are measured on.
        dictionaries: by name; the others are compared with the first.
        baselines: those of all dictionaries by their kind, as in a report, and by their L0 if there are several of a
            kind: `pca, L0 16`. Of those that differ only in an L0 that is nearly the same, the first is kept. A skip
            connection is named by its dictionary: `skip, NAME`.
    """

    key: dict[str, Any]
    hook: str
    model: dict[str, Any]
    data: dict[str, Any]
    token_policy: dict[str, Any]
    evaluated: dict[str, Any]
    dictionaries: dict[str, Compared]
    baselines: dict[str, Compared]

    @property
    def first(self) -> str:
        """Name of the dictionary that the others are compared with."""
        return next(iter(self.dictionaries))

    def to_json(self) -> dict[str, Any]:
        parts = {
            part: {name: entry.to_json() for name, entry in getattr(self, part).items()}
            for part in ("dictionaries", "baselines")
        }
        plain = {name: getattr(self, name) for name in ("key", "hook", "model", "data", "token_policy", "evaluated")}
        return COMPARISON.headed({**plain, **parts})

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Comparison:
        parts = {
            part: {name: Compared.from_json(entry) for name, entry in record[part].items()}
            for part in ("dictionaries", "baselines")
        }
        rest = {name: value for name, value in record.items() if name not in HEAD}
        return Comparison(**{**rest, **parts})

    @staticmethod
    def of(evaluations: Mapping[str, tuple[Mapping[str, Any], Totals]]) -> Comparison:
        """From the content of each `eval.json` and `eval-documents.safetensors`, all on the same tokens."""
        records = {name: record for name, (record, _) in evaluations.items()}
        reference, first_totals = next(iter(evaluations.values()))
        dictionaries = {}
        for number, (name, (record, totals)) in enumerate(evaluations.items()):
            own = [name for name in record if name in METRICS and not METRICS[name].is_common] if number else []
            pairs = {metric: difference(metric, totals, first_totals) for metric in own}
            differences = {metric: estimate for metric, estimate in pairs.items() if estimate is not None}
            dictionaries[name] = Compared.of(record, differences)
        identities = {name: record["dictionary"] for name, record in records.items()}
        settings = EvaluationConfig.model_validate(reference["settings"])
        return Comparison(
            key=comparison_key(identities, reference["activations"], reference["hook"], settings),
            dictionaries=dictionaries,
            baselines=_baselines(records),
            evaluated={
                **reference["evaluated"],
                "baseline_tokens": fewest_of_baselines(records.values(), "tokens"),
                "baseline_positions": fewest_of_baselines(records.values(), "downstream_tokens"),
            },
            **{name: reference[name] for name in ("hook", "model", "data", "token_policy")},
        )


@in_own_modes
def compare(
    dictionaries: Mapping[str, Evaluated],
    cache: ActivationCache,
    *,
    hook: str | None = None,
    language_model: LanguageModel | None = None,
    settings: EvaluationConfig | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Comparison:
    """Compare several dictionaries on a cache's held-out tokens: every metric, and its difference to the first.

    The same documents are hard for all of them, so standard errors of differences are paired over documents, and much
    smaller than those of the metrics themselves.

    Args:
        dictionaries: by any names, the one to compare with first; the other arguments are those of `evaluate`.

    Raises:
        ConfigError: there are fewer than two.
        SaeError: as `evaluate` does.
    """
    check_several(dictionaries)
    reports = evaluate_all(
        dictionaries, cache,
        hook=hook, language_model=language_model, settings=settings, device=device, progress=progress,
    )  # fmt: skip
    return Comparison.of({name: (report.to_json(), report.scores.totals) for name, report in reports.items()})


def check_several(dictionaries: Mapping[str, Any]) -> None:
    """Raise ConfigError if there are fewer than two."""
    if len(dictionaries) < 2:
        raise ConfigError(
            f"{len(dictionaries)} dictionaries to compare: give two at least, the one to compare with first"
        )


def comparison_key(
    identities: Mapping[str, Mapping[str, Any]], activations: str, hook: str, settings: EvaluationConfig
) -> dict[str, Any]:
    """Everything that determines a comparison's numbers; keys are equal only if the numbers are.

    Args:
        identities: of the dictionaries, by name, as `eval.json` has them.
        activations: hash of the activations.
        hook: hook point.
        settings: of the evaluation.
    """
    facts = {
        "sae_version": version.__version__,
        "dictionaries": [[name, identity] for name, identity in identities.items()],
        "activations": activations,
        "hook": hook,
        "settings": settings.model_dump(mode="json"),
    }
    return as_read_back(facts)


def _baselines(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Compared]:
    """Each baseline once, by its kind, and by its L0 if there are several of a kind; skip connections by dictionary."""
    by_kind: dict[str, list[Compared]] = {}
    for name, record in records.items():
        for kind, baseline in record["baselines"].items():
            own = kind == "skip" and len(records) > 1
            entry, variants = Compared.of(baseline), by_kind.setdefault(f"skip, {name}" if own else kind, [])
            if not any(_alike(kind, entry, other) for other in variants):
                variants.append(entry)
    named: dict[str, Compared] = {}
    order = list(dict.fromkeys(kind.partition(",")[0] for kind in by_kind))
    for kind, variants in sorted(by_kind.items(), key=lambda item: order.index(item[0].partition(",")[0])):
        for entry in variants:
            l0 = _l0(entry)
            name = kind if len(variants) == 1 or l0 is None else f"{kind}, L0 {l0:.3g}"
            duplicates = sum(other == name or other.startswith(f"{name} (") for other in named)
            named[f"{name} ({duplicates + 1})" if duplicates else name] = entry
    return named


def _alike(kind: str, one: Compared, other: Compared) -> bool:
    """Whether two baselines of a kind are the same, or differ only in an L0 that is nearly the same."""
    if one.description == other.description:
        return True
    subjects = [(entry.features, entry.description.partition(",")[0]) for entry in (one, other)]
    l0s = [l0 for entry in (one, other) if (l0 := _l0(entry)) is not None]
    return (kind == "pca" or subjects[0] == subjects[1]) and len(l0s) == 2 and max(l0s) <= NEAR_L0 * min(l0s)


def _l0(entry: Compared) -> float | None:
    return entry.metrics["l0"].value if "l0" in entry.metrics else None
