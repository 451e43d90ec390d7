"""Several dictionaries on the same held-out tokens: every metric, and its difference to the first, paired."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from sae.activations.cache import ActivationCache
from sae.config.progress import Progress
from sae.config.settings import EvaluationConfig
from sae.errors import ConfigError
from sae.evaluation.candidate import Evaluated
from sae.evaluation.metrics import METRICS, Totals, below_noise, difference
from sae.evaluation.report import HEADINGS, fewest_of_baselines
from sae.evaluation.scoring import evaluate_all
from sae.files import version
from sae.files.formats import HEAD, Format, as_read_back
from sae.model.language_model import LanguageModel
from sae.numerics.modes import in_own_modes
from sae.results.estimate import Estimate

FORMAT = Format("sae-comparison", 1)
COMMON = ("ce_clean", "ce_zero", "ce_mean")
"""Metrics of the language model alone, the same for all dictionaries."""
JSON_FILE, MARKDOWN_FILE = "compare.json", "compare.md"


@dataclass(frozen=True)
class Compared:
    """A dictionary, or a baseline, in a comparison.

    Attributes:
        description: what it is, in a line.
        metrics: what was measured, by the names of the definitions.
        features: how many it has; 0 of what has none.
        dead: those that never fired; dense: those that fired on more than a tenth of the tokens. None without features.
        differences: to the first dictionary, standard errors paired over documents; of dictionaries alone.
    """

    description: str
    metrics: dict[str, Estimate]
    features: int
    dead: int | None
    dense: int | None
    differences: dict[str, Estimate] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        differences = {
            name: {**made.to_json(), "below_noise": below_noise(made)} for name, made in self.differences.items()
        }
        metrics = {name: made.to_json() for name, made in self.metrics.items()}
        return {**asdict(self), "metrics": metrics, "differences": differences}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Compared:
        estimates = {
            part: {name: Estimate.from_json(made) for name, made in record[part].items()}
            for part in ("metrics", "differences")
        }
        return Compared(**{**record, **estimates})


@dataclass(frozen=True)
class Comparison:
    """What `compare` gives.

    Attributes:
        key: what it is of: hashes of weights and activations, hook point, settings, package version.
        hook, model, data: where the activations come from.
        token_policy: which tokens count.
        evaluated: how many tokens and documents, by the names in `eval.json`; `baseline_tokens` and
            `baseline_positions` are the least that a baseline, and its losses, are measured on.
        dictionaries: by name; the first is what the others are measured against.
        baselines: of all of them, each once, by what they are.
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
        """What the others are measured against."""
        return next(iter(self.dictionaries))

    def to_json(self) -> dict[str, Any]:
        parts = {
            part: {name: made.to_json() for name, made in getattr(self, part).items()}
            for part in ("dictionaries", "baselines")
        }
        plain = {name: getattr(self, name) for name in ("key", "hook", "model", "data", "token_policy", "evaluated")}
        return {**FORMAT.head(), **plain, **parts}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Comparison:
        parts = {
            part: {name: Compared.from_json(made) for name, made in record[part].items()}
            for part in ("dictionaries", "baselines")
        }
        rest = {name: value for name, value in record.items() if name not in HEAD}
        return Comparison(**{**rest, **parts})

    @staticmethod
    def of(evaluations: Mapping[str, tuple[Mapping[str, Any], Totals]]) -> Comparison:
        """From what `eval.json` and `eval-documents.safetensors` hold of each, all on the same tokens."""
        records = {name: record for name, (record, _) in evaluations.items()}
        reference, first_totals = next(iter(evaluations.values()))
        dictionaries = {}
        for number, (name, (record, totals)) in enumerate(evaluations.items()):
            own = [metric for metric in METRICS if metric not in COMMON] if number else []
            found = {metric: difference(metric, totals, first_totals) for metric in own}
            kept = {metric: made for metric, made in found.items() if made is not None}
            dictionaries[name] = _compared(record, record["description"], kept)
        identities = {name: record["dictionary"] for name, record in records.items()}
        settings = EvaluationConfig.model_validate(reference["settings"])
        return Comparison(
            key=comparison_key(identities, reference["activations"], reference["hook"], settings),
            dictionaries=dictionaries,
            baselines=_baselines(records.values()),
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
    """Set several dictionaries side by side, on a cache's held-out tokens.

    Every metric of each, and how it differs from that of the first. The same documents are hard for all of them, so
    standard errors of differences are paired over documents, and much smaller than those of the metrics themselves.

    Args:
        dictionaries: by whatever names, the one to compare with first; the other arguments are those of `evaluate`.

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
    """Raise ConfigError where there are fewer than two."""
    if len(dictionaries) < 2:
        raise ConfigError(
            f"{len(dictionaries)} dictionaries to compare: give two at least, the one to compare with first"
        )


def comparison_key(
    identities: Mapping[str, Mapping[str, Any]], activations: str, hook: str, settings: EvaluationConfig
) -> dict[str, Any]:
    """All that decides a comparison's numbers: equal only for equal ones.

    Args:
        identities: of the dictionaries, by name, as `eval.json` has them.
        activations: hash of the activations.
        hook: hook point.
        settings: how much is evaluated.
    """
    facts = {
        "sae_version": version.__version__,
        "dictionaries": [[name, identity] for name, identity in identities.items()],
        "activations": activations,
        "hook": hook,
        "settings": settings.model_dump(mode="json"),
    }
    return as_read_back(facts)


def _compared(record: Mapping[str, Any], description: str, differences: dict[str, Estimate]) -> Compared:
    metrics = {name: record[name] for name in METRICS if record.get(name) is not None}
    dead, dense = record.get("dead"), record.get("dense")
    return Compared(
        description=description,
        metrics={name: Estimate.from_json(made) for name, made in metrics.items()},
        features=record.get("features") or 0,
        dead=dead["features"] if dead else None,
        dense=dense["features"] if dense else None,
        differences=differences,
    )


def _baselines(records: Iterable[Mapping[str, Any]]) -> dict[str, Compared]:
    """Each once, by its kind; and by the features that fire where there are several of a kind."""
    of_kind: dict[str, dict[str, Compared]] = {}
    for record in records:
        for kind, baseline in record["baselines"].items():
            description = baseline["description"]
            of_kind.setdefault(kind, {})[description] = _compared(baseline, description, {})
    named: dict[str, Compared] = {}
    for kind, found in of_kind.items():
        for made in found.values():
            l0 = made.metrics.get("l0")
            size = f", L0 {l0.value:.3g}" if len(found) > 1 and l0 is not None and l0.value is not None else ""
            name = f"{HEADINGS[kind]}{size}"
            again = sum(other == name or other.startswith(f"{name} (") for other in named)
            named[f"{name} ({again + 1})" if again else name] = made
    return named
