"""The result of an evaluation, for programs: `Report` and its JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from safetensors.torch import save
from torch import Tensor

import sae
from sae.config import EvaluationConfig
from sae.dictionary import Dictionary, weights_sha256
from sae.errors import DamagedError
from sae.evaluation.downstream import DOWNSTREAM_NAMES, DownstreamScores
from sae.evaluation.estimate import Estimate
from sae.evaluation.legacy_pass import LegacyScores
from sae.evaluation.reconstruction import ReconstructionScores
from sae.evaluation.sparsity import SparsityScores
from sae.evaluation.streams import NormHistogram
from sae.files import delete, stands, write_bytes, write_json
from sae.hashes import check, damaged, recorded, sha256_of
from sae.paths import expanded
from sae.reading import load_tensors, read_object, taken_apart, validated
from sae.tail import Road
from sae.tokens import TokenPolicy
from sae.transcoding import Hooks

FORMAT, FORMAT_VERSION = "sae-evaluation", 2
JSON_FILE, MARKDOWN_FILE, FIGURE_FOLDER = "eval.json", "eval.md", "figures"
DOCUMENTS_FILE = "eval-documents.safetensors"
HEADINGS = {
    "dictionary": "dictionary", "pca": "PCA", "random": "random", "frozen_decoder": "frozen decoder",
    "identity": "identity",
}  # fmt: skip
"""What columns are called in tables."""


@dataclass(frozen=True)
class Scores:
    """Everything measured of one reconstructor.

    Attributes:
        description: what it is, in a line.
        tokens: that reconstruction and sparsity are of.
        reconstruction: against the activations.
        sparsity: of its codes; None for the identity.
        downstream: in the language model; None where none was given.
    """

    description: str
    tokens: int
    reconstruction: ReconstructionScores
    sparsity: SparsityScores | None
    downstream: DownstreamScores | None = None

    @property
    def totals(self) -> dict[str, Tensor]:
        """Float64 sums over each document of the split, which every metric is a ratio of."""
        parts = (self.reconstruction, self.sparsity, self.downstream)
        return {name: column for part in parts if part is not None for name, column in part.totals.items()}

    def with_downstream(self, downstream: DownstreamScores) -> Scores:
        """The same with language-model losses."""
        return dataclasses.replace(self, downstream=downstream)

    def to_json(self) -> dict[str, Any]:
        """Metrics by the names of the definitions; null where one was not measured."""
        sparsity: dict[str, Any] = self.sparsity.to_json() if self.sparsity else dict.fromkeys(SPARSITY_NAMES)
        downstream: dict[str, Any] = self.downstream.to_json() if self.downstream else dict.fromkeys(DOWNSTREAM_NAMES)
        features = len(self.sparsity.firings) if self.sparsity else None
        return {"features": features, **self.reconstruction.to_json(), **sparsity, **downstream}


SPARSITY_NAMES = ("l0", "l0_quantiles", "l1", "density", "dead", "dense")


@dataclass(frozen=True)
class Report:
    """An evaluation.

    Attributes:
        dictionary: its architecture, shape, settings, number type and a hash of its weights.
        hook: hook point.
        model: identity of the language model the activations come from.
        data: identity of the text.
        activations: hash of all that decides the cache's activations: model, text, token policy, number type.
        settings: how much was asked for.
        policy: which tokens count.
        training_policy: which tokens counted in training; None where unknown.
        tokens: held-out tokens evaluated.
        masked: held-out tokens among them that the policy leaves out.
        documents: documents with an evaluated token: the sample size of every standard error.
        scores: the dictionary's; `scores.sparsity.density` is the density of every feature.
        baselines: `pca`, `random`, `frozen_decoder` where one was trained, `identity`.
        legacy: by other packages' formulas; None where these were left out.
        dead_in_training: features that had not fired for `tokens` tokens when training ended; None where unknown.
        norms: of the activations, eligible and masked.
        seconds: it took.
        road: how replacements at the hook point became logits (`sae.tail.Road`); None without a language model.
    """

    dictionary: dict[str, Any]
    hook: str
    model: dict[str, Any]
    data: dict[str, Any]
    activations: str
    settings: EvaluationConfig
    policy: TokenPolicy
    training_policy: TokenPolicy | None
    tokens: int
    masked: int
    documents: int
    scores: Scores
    baselines: dict[str, Scores]
    legacy: LegacyScores | None
    dead_in_training: dict[str, Any] | None
    norms: NormHistogram
    seconds: float
    road: Road | None = None

    @property
    def columns(self) -> dict[str, Scores]:
        """The dictionary and its baselines, in the order of the tables."""
        return {"dictionary": self.scores, **self.baselines}

    def documents_content(self) -> bytes:
        """What `eval-documents.safetensors` holds."""
        return save(dict(sorted(self.scores.totals.items())))

    def to_json(self) -> dict[str, Any]:
        """What `eval.json` holds: the dictionary's metrics at the top, the baselines' under `baselines`."""
        downstream = self.scores.downstream
        metrics = self.scores.to_json()
        metrics["dead"] = {**metrics["dead"], "in_training": self.dead_in_training}
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "sae_version": sae.__version__,
            "dictionary": self.dictionary,
            "description": self.scores.description.removeprefix("dictionary: "),
            "hook": self.hook,
            "model": self.model,
            "data": self.data,
            "activations": self.activations,
            "settings": self.settings.model_dump(mode="json"),
            "token_policy": self.policy.to_json(),
            "training_token_policy": self.training_policy.to_json() if self.training_policy else None,
            "evaluated": {
                "tokens": self.tokens,
                "masked_tokens": self.masked,
                "documents": self.documents,
                "downstream_tokens": downstream.tokens if downstream else None,
                "downstream_documents": downstream.documents if downstream else None,
            },
            **metrics,
            "baselines": {
                name: {
                    "description": scores.description,
                    "tokens": scores.tokens,
                    "downstream_tokens": scores.downstream.tokens if scores.downstream else None,
                    "downstream_documents": scores.downstream.documents if scores.downstream else None,
                    **scores.to_json(),
                }
                for name, scores in self.baselines.items()
            },
            "legacy": self.legacy.to_json() if self.legacy else None,
            "road": dataclasses.asdict(self.road) if self.road else None,
            "activation_norms": self.norms.to_json(),
            "documents_sha256": hashlib.sha256(self.documents_content()).hexdigest(),
            "seconds": round(self.seconds, 3),
        }


class _Count(BaseModel):
    features: int


class _Baseline(BaseModel):
    description: str
    downstream_tokens: int | None
    features: int | None
    dead: _Count | None
    dense: _Count | None


class _Stored(BaseModel):
    """What is read of `eval.json`, estimates left out."""

    description: str
    hook: str
    model: dict[str, Any]
    data: dict[str, Any]
    token_policy: dict[str, Any]
    evaluated: dict[str, int | None]
    features: int | None
    dead: _Count | None
    dense: _Count | None
    baselines: dict[Literal["pca", "random", "frozen_decoder", "identity"], _Baseline]


def fewest_of_baselines(
    records: Iterable[Mapping[str, Any]], key: Literal["tokens", "downstream_tokens"]
) -> int | None:
    """The least that a baseline of them is measured on; None where none says it."""
    numbers = [one.get(key) for record in records for one in record["baselines"].values()]
    return min((number for number in numbers if number is not None), default=None)


def write_report(report: Report, folder: str | Path, metrics_path: str | Path | None = None) -> list[Path]:
    """Write `eval.json`, `eval.md`, `eval-documents.safetensors` and, where matplotlib is installed, `figures/*.png`.

    The third holds the sums over each document of the split that the dictionary's metrics are ratios of, so that two
    dictionaries can be compared document by document; `eval.json` names its checksum.

    An older `eval.json` goes first and the new one comes last: a kill between leaves a folder that is not evaluated.

    Args:
        report: what to write.
        folder: where; the run folder, as a rule.
        metrics_path: `metrics.jsonl` of the training, for its curves; None: no curves.

    Returns:
        The files, `eval.json` first.

    Raises:
        CacheError: the folder cannot be written.
    """
    from sae.evaluation.figures import draw_figures
    from sae.evaluation.report_view import markdown

    folder = expanded(folder)
    figures = draw_figures(report, expanded(metrics_path) if metrics_path is not None else None)
    index = folder / JSON_FILE
    contents = {
        folder / MARKDOWN_FILE: markdown(report, figures).encode(),
        folder / DOCUMENTS_FILE: report.documents_content(),
        **{folder / FIGURE_FOLDER / figure.file: figure.png for figure in figures or []},
    }
    record = report.to_json()
    delete(index)
    for path, content in contents.items():
        write_bytes(path, content)
    write_json(index, record)  # last: where it is, the rest is
    return [index, *contents]


def identify(dictionary: Dictionary) -> dict[str, Any]:
    """What tells a dictionary from another: its configuration, what a transcoder reads, and a hash of its weights."""
    left_out = ("format", "format_version", "metadata")
    kept = {key: value for key, value in dictionary.config().items() if key not in left_out}
    reads = Hooks.of(dictionary.metadata).read_elsewhere
    return {**kept, **({"reads": reads} if reads else {}), "weights_sha256": weights_sha256(dictionary)}


def read_stored(
    folder: str | Path, dictionary: dict[str, Any], activations: str, *, hook: str, settings: EvaluationConfig
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """A written report and its sums over documents, where they are of just this.

    Args:
        folder: where `write_report` wrote.
        dictionary: `identify` of what was evaluated.
        activations: hash of the activations.
        hook: hook point.
        settings: how much was asked for.

    Returns:
        None where anything differs, be it the version of this package, where a file is missing, and where the sums are
        whole but of another evaluation, as a kill could leave them before `eval.json` was deleted first.

    Raises:
        DamagedError: a file is damaged.
    """
    folder = expanded(folder)
    if not all(stands(folder / name) for name in (JSON_FILE, MARKDOWN_FILE, DOCUMENTS_FILE)):
        return None
    record = read_object(folder / JSON_FILE)
    asked = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "sae_version": sae.__version__,
        "dictionary": json.loads(json.dumps(dictionary)),
        "activations": activations,
        "hook": hook,
        "settings": settings.model_dump(mode="json"),
    }
    if any(record.get(key) != value for key, value in asked.items()):
        return None
    validated(folder / JSON_FILE, _Stored, record)
    with taken_apart(folder / JSON_FILE):
        TokenPolicy.from_json(record["token_policy"])
        for part in (record, *record["baselines"].values()):
            for value in part.values():
                if isinstance(value, dict) and "standard_error" in value:
                    Estimate.from_json(value)
    check(folder / MARKDOWN_FILE)
    path = folder / DOCUMENTS_FILE
    totals = load_tensors(path)
    if not _are_of(path, record):
        if recorded(path):
            return None
        raise _of_another(path)
    return record, totals


def check_documents(folder: Path) -> None:
    """Compare the sums over documents with the report beside them.

    Raises:
        DamagedError: they are of another evaluation, or one of the files is damaged.
    """
    path = folder / DOCUMENTS_FILE
    if not _are_of(path, read_object(folder / JSON_FILE)):
        raise _of_another(path)


def _are_of(documents: Path, record: dict[str, Any]) -> bool:
    return sha256_of(documents) == record.get("documents_sha256")


def _of_another(documents: Path) -> DamagedError:
    return damaged(documents, f"its SHA-256 is not the one in {JSON_FILE}")
