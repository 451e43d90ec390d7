"""Evaluations, comparisons and replacements as files: written completely, and read again if they match the request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel
from torch import Tensor

from sae.config.settings import EvaluationConfig
from sae.dictionary.token_policy import TokenPolicy
from sae.errors import DamagedError
from sae.evaluation.comparison import COMPARISON, COMPARISON_TEXT, Compared, Comparison
from sae.evaluation.comparison_view import comparison_markdown
from sae.evaluation.figures import draw_figures
from sae.evaluation.replacement import MARKDOWN_FILE as REPLACEMENT_TEXT
from sae.evaluation.replacement import REPLACEMENT, ReplacementReport
from sae.evaluation.replacement_view import replacement_markdown
from sae.evaluation.report import DOCUMENTS_FILE, FIGURE_FOLDER, JSON_FILE, MARKDOWN_FILE, REPORT, Report
from sae.evaluation.report_view import markdown
from sae.files.damage import damaged
from sae.files.digest import sha256_of
from sae.files.hashes import check
from sae.files.kept import KeptResult
from sae.files.paths import expanded
from sae.files.reading import conforming, load_tensors, read_object, taken_apart, validated
from sae.files.sums import recorded
from sae.results.estimate import Estimate

Result = TypeVar("Result")


class _Count(BaseModel):
    features: int


class _Baseline(BaseModel):
    description: str
    downstream_tokens: int | None
    features: int | None
    dead: _Count | None
    dense: _Count | None


class _Stored(BaseModel):
    """The part of `eval.json` that is read, without estimates."""

    description: str
    hook: str
    model: dict[str, Any]
    data: dict[str, Any]
    token_policy: dict[str, Any]
    evaluated: dict[str, int | None]
    features: int | None
    dead: _Count | None
    dense: _Count | None
    baselines: dict[Literal["pca", "random", "linear", "skip", "frozen_decoder", "identity"], _Baseline]


def write_report(report: Report, folder: str | Path, metrics_path: str | Path | None = None) -> list[Path]:
    """Write `eval.json`, `eval.md`, `eval-documents.safetensors` and, if matplotlib is installed, `figures/*.png`.

    The third holds the sums over each document of the split that the dictionary's metrics are ratios of, so that two
    dictionaries can be compared document by document; `eval.json` names its checksum.

    An older `eval.json` is deleted first and the new one written last: a kill in between leaves no evaluation.

    Args:
        report: what to write.
        folder: where to write; usually the run folder.
        metrics_path: `metrics.jsonl` of the training, for its curves; None: no curves.

    Returns:
        The files, `eval.json` first.

    Raises:
        CacheError: the folder cannot be written.
    """
    figures = draw_figures(report, expanded(metrics_path) if metrics_path is not None else None)
    files = {
        MARKDOWN_FILE: markdown(report, figures).encode(),
        DOCUMENTS_FILE: report.documents_content(),
        **{f"{FIGURE_FOLDER}/{figure.file}": figure.png for figure in figures or []},
    }
    return REPORT.write(expanded(folder), report.to_json(), files)


@dataclass(frozen=True)
class StoredReport:
    """A report as its files keep it: all metrics and their sums over documents, but no densities of single features.

    Attributes:
        record: the content of `eval.json`.
        totals: that of `eval-documents.safetensors`.
    """

    record: dict[str, Any]
    totals: dict[str, Tensor]

    @property
    def columns(self) -> dict[str, Compared]:
        """The metrics of the dictionary and its baselines, in the order of the tables."""
        baselines = {name: Compared.of(baseline) for name, baseline in self.record["baselines"].items()}
        return {"dictionary": Compared.of(self.record), **baselines}


def read_stored(
    folder: str | Path, dictionary: dict[str, Any], activations: str, *, hook: str, settings: EvaluationConfig
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """A stored report and its sums over documents, if they match the request.

    Args:
        folder: where `write_report` wrote.
        dictionary: `identify` of what was evaluated.
        activations: hash of the activations.
        hook: hook point.
        settings: as requested.

    Returns:
        None if anything differs, including the version of this package, if a file is missing, or if the sums are intact
        but of another evaluation, as a kill could leave them before `eval.json` was deleted first.

    Raises:
        DamagedError: a file is damaged.
    """
    folder = expanded(folder)
    record = REPORT.find(
        folder, dictionary=dictionary, settings=settings.model_dump(mode="json"), activations=activations, hook=hook
    )
    if record is None:
        return None
    validated(folder / JSON_FILE, _Stored, record)
    if not _expected_baselines(dictionary) <= record["baselines"].keys():
        return None  # from before transcoders had baselines of their own
    with taken_apart(folder / JSON_FILE):
        TokenPolicy.from_json(record["token_policy"])
        for part in (record, *record["baselines"].values()):
            for value in part.values():
                if isinstance(value, dict) and "standard_error" in value:
                    Estimate.from_json(value)
    check(folder / MARKDOWN_FILE)
    path = folder / DOCUMENTS_FILE
    totals = load_tensors(path)
    if not _belong_to(path, record):
        if recorded(path):
            return None
        raise _mismatch(path)
    return record, totals


def _expected_baselines(dictionary: Mapping[str, Any]) -> set[str]:
    """Baselines that a report on this dictionary has, besides those of every report."""
    return {*(["linear"] if "reads" in dictionary else []), *(["skip"] if dictionary.get("skip") else [])}


def check_documents(folder: Path) -> None:
    """Check that the sums over documents belong to the report next to them.

    Raises:
        DamagedError: they belong to another evaluation, or one of the files is damaged.
    """
    path = folder / DOCUMENTS_FILE
    if not _belong_to(path, read_object(folder / JSON_FILE)):
        raise _mismatch(path)


def _belong_to(documents: Path, record: dict[str, Any]) -> bool:
    return sha256_of(documents) == record.get("documents_sha256")


def _mismatch(documents: Path) -> DamagedError:
    return damaged(documents, f"its SHA-256 is not the one in {JSON_FILE}")


def write_comparison(comparison: Comparison, folder: str | Path) -> list[Path]:
    """Write `compare.md` and `compare.json`.

    Raises:
        CacheError: the folder cannot be written.
    """
    files = {COMPARISON_TEXT: comparison_markdown(comparison).encode()}
    return COMPARISON.write(expanded(folder), comparison.to_json(), files)


def read_comparison(folder: str | Path, key: Mapping[str, Any] | None = None) -> Comparison | None:
    """A stored comparison; None if there is none.

    Args:
        folder: where `write_comparison` wrote.
        key: only a comparison with this key, all of whose dictionaries have a hash; None: whatever is stored.

    Raises:
        DamagedError: the file is damaged.
        FormatError: it has a newer version.
    """
    if key is not None and not all(identity["weights_sha256"] for _, identity in key["dictionaries"]):
        return None
    return _read(COMPARISON, Comparison.from_json, expanded(folder), key)


def write_replacement(report: ReplacementReport, folder: str | Path) -> list[Path]:
    """Write `replacement.md` and `replacement.json`.

    Raises:
        CacheError: the folder cannot be written.
    """
    files = {REPLACEMENT_TEXT: replacement_markdown(report).encode()}
    return REPLACEMENT.write(expanded(folder), report.to_json(), files)


def read_replacement(folder: str | Path, key: Mapping[str, Any] | None = None) -> ReplacementReport | None:
    """A stored report on replaced modules; None if there is none.

    Args:
        folder: where `write_replacement` wrote.
        key: only a report with this key; None: whatever is stored.

    Raises:
        DamagedError: the file is damaged.
        FormatError: it has a newer version.
    """
    return _read(REPLACEMENT, ReplacementReport.from_json, expanded(folder), key)


def _read(
    kept: KeptResult, parse: Callable[[Mapping[str, Any]], Result], folder: Path, key: Mapping[str, Any] | None
) -> Result | None:  # fmt: skip
    """A stored result with this key, or whichever is stored; None if there is none."""
    record = kept.find(folder, **({} if key is None else {"key": key}))
    if record is None:
        return None
    with taken_apart(folder / kept.index):
        return conforming(parse(record))
