"""Columns and types of Neuronpedia's tables and SAEDashboard's classes, and Neuronpedia's import in plain Python.

Written from hijohnnylin/neuronpedia (commit ebb8426f), `apps/webapp/prisma/schema.prisma` and `lib/db/import.ts`, and
from jbloomAus/SAEDashboard (commit db4839a), `sae_dashboard/neuronpedia/`. A field without a default must be in every
row.
"""
# ruff: noqa: N815  their names

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, FiniteFloat, HttpUrl, TypeAdapter

Floats: TypeAlias = list[FiniteFloat]
Whole: TypeAlias = list[int]
Texts: TypeAlias = list[str]
Visibility: TypeAlias = Literal["PUBLIC", "UNLISTED", "PRIVATE"]


class Row(BaseModel):
    """What no column is named for is an error, and so is a number that is written as text."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Model(Row):
    id: str
    displayNameShort: str = ""
    displayName: str = ""
    creatorId: str
    tlensId: str | None = None
    dimension: int | None = None
    visibility: Visibility = "PRIVATE"
    layers: int
    neuronsPerLayer: int
    owner: str
    inferenceEnabled: bool = False
    instruct: bool = False
    website: HttpUrl | None = None


class SourceRelease(Row):
    name: str
    visibility: Visibility = "PRIVATE"
    description: str
    descriptionShort: str | None = None
    urls: Texts
    creatorEmail: str | None = None
    creatorName: str
    creatorNameShort: str | None = None
    creatorId: str


class SourceSet(Row):
    modelId: str
    name: str
    hasDashboards: bool = True
    visibility: Visibility = "PRIVATE"
    description: str
    type: str = ""
    creatorName: str
    urls: Texts
    creatorId: str
    releaseName: str | None = None


class Source(Row):
    id: str
    modelId: str
    hasDashboards: bool = True
    inferenceEnabled: bool = False
    visibility: Visibility = "PRIVATE"
    setName: str
    creatorId: str
    num_prompts: int | None = None
    num_tokens_in_prompt: int | None = None
    dataset: str | None = None
    notes: str | None = None


class SharedColumns(Row):
    neuron_alignment_indices: Whole
    neuron_alignment_values: Floats
    neuron_alignment_l1: Floats
    correlated_neurons_indices: Whole
    correlated_neurons_pearson: Floats
    correlated_neurons_l1: Floats
    correlated_features_indices: Whole
    correlated_features_pearson: Floats
    correlated_features_l1: Floats
    neg_str: Texts
    neg_values: Floats
    pos_str: Texts
    pos_values: Floats
    frac_nonzero: FiniteFloat
    freq_hist_data_bar_heights: Floats
    freq_hist_data_bar_values: Floats
    logits_hist_data_bar_heights: Floats
    logits_hist_data_bar_values: Floats
    decoder_weights_dist: Floats


class Neuron(SharedColumns):
    modelId: str
    layer: str
    index: str
    sourceSetName: str | None = None
    creatorId: str | None = None
    maxActApprox: FiniteFloat | None = 0
    hasVector: bool = False
    vector: Floats = []
    vectorLabel: str | None = None
    hookName: str | None = None
    topkCosSimIndices: Whole = []
    topkCosSimValues: Floats = []


class Activation(Row):
    id: str
    tokens: Texts
    index: str
    layer: str
    modelId: str
    maxValue: FiniteFloat
    maxValueTokenIndex: int
    minValue: FiniteFloat
    values: Floats
    creatorId: str
    binMin: FiniteFloat | None = None
    binMax: FiniteFloat | None = None
    binContains: FiniteFloat | None = None
    qualifyingTokenIndex: int | None = None


class DashboardActivation(Row):
    bin_min: FiniteFloat
    bin_max: FiniteFloat
    bin_contains: FiniteFloat
    tokens: Texts
    values: Floats
    qualifying_token_index: int
    dfa_values: Floats | None = None
    dfa_maxValue: FiniteFloat | None = None
    dfa_targetIndex: int | None = None


class DashboardFeature(SharedColumns):
    feature_index: int
    n_prompts_total: int
    n_tokens_in_prompt: int
    dataset: str
    activations: list[DashboardActivation]
    vector: Floats


class DashboardBatch(Row):
    model_id: str
    layer: int
    sae_set: str
    sae_id_suffix: str | None
    features: list[DashboardFeature]


class Skipped(Row):
    model_id: str
    layer: str
    sae_set: str
    log_sparsity: float | None
    skipped_indexes: Whole


class RunSettings(Row):
    """Of `NeuronpediaRunnerConfig`; its other fields have defaults."""

    sae_set: str
    sae_path: str
    outputs_dir: str
    np_set_name: str | None = None
    n_prompts_total: int
    n_tokens_in_prompt: int
    n_features_at_a_time: int
    n_quantiles: int
    top_acts_group_size: int
    quantile_group_size: int
    model_id: str | None = None
    layer: int | None = None


METADATA: dict[str, type[Row]] = {
    "release": SourceRelease, "model": Model, "sourceset": SourceSet, "source": Source,
}  # fmt: skip


def imported(root: Path) -> dict[str, list[Any]]:
    """The rows of every table after Neuronpedia's import of the one source below `root`, checked as the database would.

    The import takes the columns of a file from its first line, and drops rows whose key exists.
    """
    [source] = [path.parent for path in root.rglob("source.jsonl")]
    tables: dict[str, list[Any]] = {}
    for name, row in METADATA.items():
        lines = (source / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
        tables[name] = [row.model_validate(json.loads(line)) for line in filter(None, lines)]
    assert (source.parent.name, source.name) == (tables["source"][0].modelId, tables["source"][0].id)
    for name, row in (("features", Neuron), ("activations", Activation)):
        tables[name] = []
        for path in sorted((source / name).iterdir()):
            assert path.name.endswith(".jsonl.gz")
            text = gzip.decompress(path.read_bytes()).decode().replace("\\u0000", " ")
            lines = [json.loads(line) for line in text.strip().split("\n")]
            columns = list(lines[0])
            for line in lines:
                assert list(line) == columns, "other columns would be lost"
                "".join(str(part) for part in line.values()).encode()  # no half surrogate pairs
            tables[name] += TypeAdapter[list[Any]](list[row]).validate_python(lines)
    _check_keys(tables)
    return tables


def _check_keys(tables: dict[str, list[Any]]) -> None:
    """Primary keys are unique, foreign keys exist."""
    [release], [model], [of_set], [source] = (tables[name] for name in METADATA)
    assert (of_set.modelId, of_set.releaseName) == (model.id, release.name)
    assert (source.modelId, source.setName) == (model.id, of_set.name)
    assert source.id.split("-", 1)[1] == of_set.name
    assert int(source.id.split("-", 1)[0]) >= 0
    keys = [(row.modelId, row.layer, row.index) for row in tables["features"]]
    assert len(set(keys)) == len(keys)
    assert {(model.id, source.id)} == {key[:2] for key in keys}
    assert all(row.sourceSetName == of_set.name for row in tables["features"])
    assert {(row.modelId, row.layer, row.index) for row in tables["activations"]} <= set(keys)
    identities = [row.id for row in tables["activations"]]
    assert len(set(identities)) == len(identities)
    assert all(len(key) == 25 and key.isalnum() and key.startswith("c") for key in identities)
    assert len({row.creatorId for rows in tables.values() for row in rows}) == 1
