"""The result of an evaluation: `Report` and its JSON."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from sae.config.settings import EvaluationConfig
from sae.dictionary.published import Published
from sae.dictionary.token_policy import TokenPolicy
from sae.evaluation.downstream import DOWNSTREAM_NAMES, DownstreamScores
from sae.evaluation.held_out import NormHistogram
from sae.evaluation.published import PublishedScores
from sae.evaluation.reconstruction import ReconstructionScores
from sae.evaluation.sparsity import SPARSITY_NAMES, SparsityScores
from sae.files.formats import Format
from sae.files.kept import KeptResult
from sae.files.writing import tensors_content
from sae.model.tail import Road

JSON_FILE, MARKDOWN_FILE, FIGURE_FOLDER = "eval.json", "eval.md", "figures"
DOCUMENTS_FILE = "eval-documents.safetensors"
REPORT = KeptResult(Format("sae-evaluation", 2), JSON_FILE, (MARKDOWN_FILE, DOCUMENTS_FILE))
HEADINGS = {
    "dictionary": "dictionary", "pca": "PCA", "random": "random", "linear": "linear", "skip": "skip",
    "frozen_decoder": "frozen decoder", "identity": "identity",
}  # fmt: skip
"""Headings of columns in tables."""


@dataclass(frozen=True)
class Scores:
    """All scores of one reconstructor.

    Attributes:
        description: what it is, in a line.
        tokens: number of tokens for reconstruction and sparsity.
        reconstruction: against the activations.
        sparsity: of its codes; None for the identity.
        downstream: in the language model; None if none was given.
    """

    description: str
    tokens: int
    reconstruction: ReconstructionScores
    sparsity: SparsityScores | None
    downstream: DownstreamScores | None = None

    @property
    def totals(self) -> dict[str, Tensor]:
        """Float64 sums for each document of the split; every metric is a ratio of them."""
        parts = (self.reconstruction, self.sparsity, self.downstream)
        return {name: column for part in parts if part is not None for name, column in part.totals.items()}

    def with_downstream(self, downstream: DownstreamScores) -> Scores:
        """These scores with language-model losses."""
        return dataclasses.replace(self, downstream=downstream)

    def to_json(self) -> dict[str, Any]:
        """Metrics by the names of their definitions; null if not measured."""
        sparsity: dict[str, Any] = self.sparsity.to_json() if self.sparsity else dict.fromkeys(SPARSITY_NAMES)
        downstream: dict[str, Any] = self.downstream.to_json() if self.downstream else dict.fromkeys(DOWNSTREAM_NAMES)
        features = len(self.sparsity.firings) if self.sparsity else None
        return {"features": features, **self.reconstruction.to_json(), **sparsity, **downstream}


@dataclass(frozen=True)
class Report:
    """The result of an evaluation.

    Attributes:
        dictionary: its architecture, shape, settings, number type and a hash of its weights.
        hook: hook point.
        model: identity of the language model the activations come from.
        data: identity of the text.
        activations: hash of everything that determines the cache's activations: model, text, token policy, number type.
        settings: as requested.
        policy: which tokens count.
        training_policy: which tokens counted in training; None if unknown.
        tokens: held-out tokens evaluated.
        masked: held-out tokens that were read and that the policy leaves out.
        documents: documents with an evaluated token: the sample size of every standard error.
        scores: the dictionary's; `scores.sparsity.density` is the density of every feature.
        baselines: `pca`, `random`, `frozen_decoder` if one was trained, `identity`; of a transcoder `pca`, `linear`,
            `identity`; and `skip` of a dictionary with a skip connection.
        legacy: scores by other packages' formulas; None if these were left out.
        dead_in_training: features that had not fired for `tokens` tokens when training ended; None if unknown.
        norms: of the activations, eligible and masked.
        seconds: how long it took.
        road: how replacements at the hook point became logits (`sae.model.tail.Road`); None without a language model.
        published: numbers that others published with the dictionary; None if it comes without any.
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
    legacy: PublishedScores | None
    dead_in_training: dict[str, Any] | None
    norms: NormHistogram
    seconds: float
    road: Road | None = None
    published: Published | None = None

    @property
    def columns(self) -> dict[str, Scores]:
        """The dictionary and its baselines, in the order of the tables."""
        return {"dictionary": self.scores, **self.baselines}

    def documents_content(self) -> bytes:
        """The content of `eval-documents.safetensors`."""
        return tensors_content(dict(sorted(self.scores.totals.items())))

    def to_json(self) -> dict[str, Any]:
        """The content of `eval.json`: the dictionary's metrics at the top, the baselines' under `baselines`."""
        downstream = self.scores.downstream
        metrics = self.scores.to_json()
        metrics["dead"] = {**metrics["dead"], "in_training": self.dead_in_training}
        return REPORT.headed(
            {
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
                "published": self.published.to_json() if self.published else None,
                "road": dataclasses.asdict(self.road) if self.road else None,
                "activation_norms": self.norms.to_json(),
                "documents_sha256": hashlib.sha256(self.documents_content()).hexdigest(),
                "seconds": round(self.seconds, 3),
            }
        )


def place_of(record: Mapping[str, Any]) -> str:
    """The hook point of a report, after the one that a transcoder reads.

    Args:
        record: the content of `eval.json`.
    """
    reads = record["dictionary"].get("reads")
    return f"{reads} → {record['hook']}" if reads else record["hook"]


def fewest_of_baselines(
    records: Iterable[Mapping[str, Any]], key: Literal["tokens", "downstream_tokens"]
) -> int | None:
    """The smallest number that any baseline is measured on; None if no record says it."""
    numbers = [baseline.get(key) for record in records for baseline in record["baselines"].values()]
    return min((number for number in numbers if number is not None), default=None)
