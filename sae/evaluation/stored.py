"""Evaluations and comparisons as files: written whole, and read again if they are of just what is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from torch import Tensor

from sae.config.settings import EvaluationConfig
from sae.dictionary.token_policy import TokenPolicy
from sae.errors import DamagedError
from sae.evaluation import comparison as compared
from sae.evaluation.comparison import Comparison
from sae.evaluation.comparison_view import comparison_markdown
from sae.evaluation.figures import draw_figures
from sae.evaluation.report import DOCUMENTS_FILE, FIGURE_FOLDER, FORMAT, JSON_FILE, MARKDOWN_FILE, Report
from sae.evaluation.report_view import markdown
from sae.files.damage import damaged
from sae.files.digest import sha256_of
from sae.files.formats import as_read_back
from sae.files.hashes import check
from sae.files.paths import expanded
from sae.files.reading import conforming, load_tensors, read_object, taken_apart, validated
from sae.files.sums import recorded
from sae.files.writing import delete, stands, write_bytes, write_json
from sae.results.estimate import Estimate


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
    asked = {"dictionary": as_read_back(dictionary), "settings": settings.model_dump(mode="json")}
    if not FORMAT.is_current(record, activations=activations, hook=hook, **asked):
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


def write_comparison(comparison: Comparison, folder: str | Path) -> list[Path]:
    """Write `compare.md` and `compare.json`.

    Raises:
        CacheError: the folder cannot be written.
    """
    folder = expanded(folder)
    text, record = comparison_markdown(comparison).encode(), comparison.to_json()
    delete(folder / compared.JSON_FILE)
    write_bytes(folder / compared.MARKDOWN_FILE, text)
    write_json(folder / compared.JSON_FILE, record)  # last: where it is, the rest is
    return [folder / compared.JSON_FILE, folder / compared.MARKDOWN_FILE]


def read_comparison(folder: str | Path, key: Mapping[str, Any]) -> Comparison | None:
    """A written comparison, where it is of just this key, and of dictionaries that have a hash.

    Raises:
        DamagedError: the file is damaged.
    """
    folder = expanded(folder)
    path = folder / compared.JSON_FILE
    if not stands(path) or not stands(folder / compared.MARKDOWN_FILE):
        return None
    record = read_object(path)
    hashed = all(identity["weights_sha256"] for _, identity in key["dictionaries"])
    if not hashed or not compared.FORMAT.holds(record, key=key):
        return None
    with taken_apart(path):
        return conforming(Comparison.from_json(record))
