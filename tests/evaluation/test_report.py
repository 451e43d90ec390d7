from __future__ import annotations

import dataclasses
import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from sae.activations import ActivationCache
from sae.architectures import ReLU, TopK
from sae.config.settings import EvaluationConfig
from sae.errors import ConfigError, DamagedError
from sae.evaluation import Report, evaluate, evaluate_all, report_table, write_report
from sae.evaluation.metrics import METRICS, estimate
from sae.evaluation.stored import read_stored
from sae.files import kept as module
from sae.files.writing import write_bytes, write_json
from sae.model.language_model import LanguageModel
from sae.runs.verification import verify
from tests.support.evaluation_cache import make_cache, random_rows
from tests.support.fake_cache import HOOK

DEFINITIONS = (
    "mse", "fvu", "explained_variance", "cosine", "l2_ratio", "relative_reconstruction_bias", "l0", "l0_quantiles",
    "l1", "density", "dead", "dense", "ce_clean", "ce_spliced", "ce_zero", "ce_mean", "delta_ce", "ce_recovered_zero",
    "ce_recovered_mean", "kl",
)  # fmt: skip


def _topk(d_in: int = 32) -> TopK:
    dictionary = TopK(d_in, 64, k=4).requires_grad_(False)
    dictionary.W_dec.copy_(torch.nn.functional.normalize(torch.randn(64, d_in), dim=-1))
    dictionary.W_enc.copy_(dictionary.W_dec.T)
    return dictionary


@pytest.fixture(scope="module")
def report(many_documents: ActivationCache, language_model: LanguageModel) -> Report:
    return evaluate(_topk(), many_documents, hook=HOOK, language_model=language_model)


def _metrics_file(folder: Path) -> Path:
    lines = [{"step": n, "tokens": 64 * n, "fvu": 1 / n, "l0": 4, "dead": 0, "lr": 1e-3} for n in range(1, 30)]
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 30, "tok'
    (folder / "metrics.jsonl").write_text(text)
    return folder / "metrics.jsonl"


def test_json_has_every_definition_by_its_name_for_all_columns(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    written = json.loads((tmp_path / "eval.json").read_text(), parse_constant=pytest.fail)
    assert written == report.to_json()
    assert list(written["baselines"]) == ["pca", "random", "frozen_decoder", "identity"]
    for column in (written, *written["baselines"].values()):
        assert set(DEFINITIONS) <= set(column)
    for name in set(DEFINITIONS) - {"l0_quantiles", "density", "dead", "dense"}:
        assert written[name]["standard_error"] is not None, name
    assert written["token_policy"] == {"prepend_bos": True, "masked_positions": 1, "masked_ids": [0]}
    assert written["dictionary"]["k"] == 4 and len(written["dictionary"]["weights_sha256"]) == 64


def test_files_and_their_links(report: Report, tmp_path: Path) -> None:
    paths = write_report(report, tmp_path, _metrics_file(tmp_path))
    names = [str(path.relative_to(tmp_path)) for path in paths]
    documents = "eval-documents.safetensors"
    figures = [f"figures/{name}.png" for name in ("training", "density", "l0", "norms")]
    assert names == ["eval.json", "eval.md", documents, *figures]
    text = (tmp_path / "eval.md").read_text()
    for figure in figures:
        assert f"]({figure})" in text
        content = (tmp_path / figure).read_bytes()
        width, height = struct.unpack(">II", content[16:24])
        assert content[:8] == b"\x89PNG\r\n\x1a\n" and width > 800 and height > 400
    before = {path: path.read_bytes() for path in paths}
    assert {path: path.read_bytes() for path in write_report(report, tmp_path, tmp_path / "metrics.jsonl")} == before
    assert not list(tmp_path.rglob("*.tmp"))


def test_markdown_names_the_text(report: Report, tmp_path: Path) -> None:
    mixed = {"source": ["code", "path/to/prose"], "weights": [0.7, 0.3]}
    for data, text in (({"source": "stdlib"}, "`stdlib`"), (mixed, "`code` (0.7), `path/to/prose` (0.3)")):
        write_report(dataclasses.replace(report, data=data), tmp_path)
        assert f", text {text}.\n" in (tmp_path / "eval.md").read_text()


def test_markdown_tables_are_rectangular_and_state_the_policy(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    text = (tmp_path / "eval.md").read_text()
    assert f"Evaluated on {report.tokens:,} held-out tokens of {report.documents:,} documents" in text
    assert "the first position of every context and special tokens (ids 0)" in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    row = next(line for line in tables[0] if line.startswith("| `fvu`"))
    assert f" {report.scores.reconstruction.fvu} |" in row and "±" in row
    assert "training" not in {Path(line).stem for line in text.splitlines()} and "training.png" not in text


def test_terminal_table(report: Report) -> None:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(report_table(report))
    console.file.close()
    text = console.export_text()
    for name in ("fvu", "cosine", "l0", "dead", "delta_ce", "kl", "PCA", "random", "identity"):
        assert name in text
    assert str(report.scores.reconstruction.fvu) in text


def test_a_narrow_terminal_breaks_no_cell(report: Report) -> None:
    with Path(os.devnull).open("w") as nowhere:
        console = Console(width=80, record=True, file=nowhere)
        console.print(report_table(report, console.width))
    text = console.export_text()
    lines = [line.split() for line in text.splitlines()]
    for name in ("fvu", "mse", "cosine"):
        own = str(getattr(report.scores.reconstruction, name)).split()
        row = next(line for line in lines if line[:1] == [name])
        assert row[: len(own) + 1] == [name, *own]
        value = getattr(report.baselines["pca"].reconstruction, name).value
        assert float(row[len(own) + 1].replace(",", "")) == pytest.approx(value, rel=6e-3)
    assert "eval.md" in text and "…" not in text


def test_without_language_model_or_documents_there_are_dashes_not_nans(tmp_path: Path) -> None:
    x, tokens, _ = random_rows(64, 32, 3)
    cache = make_cache(tmp_path / "cache", (x, tokens, torch.zeros(64)))
    dictionary = ReLU(32, 16).requires_grad_(False)
    report = evaluate(dictionary, cache, hook=HOOK)
    write_report(report, tmp_path / "out")
    written: dict[str, Any] = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert written["ce_clean"] is None and written["evaluated"]["downstream_tokens"] is None
    assert written["fvu"]["standard_error"] is None
    text = (tmp_path / "out" / "eval.md").read_text()
    assert "± –" in text and "nan" not in text.lower() and "Not measured: no language model was given." in text


def test_no_matplotlib_no_figures(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    paths = write_report(report, tmp_path, _metrics_file(tmp_path))
    assert [path.name for path in paths] == ["eval.json", "eval.md", "eval-documents.safetensors"]
    assert "pip install 'sae[figures]'" in (tmp_path / "eval.md").read_text()


def test_other_masking_in_training_is_said(many_documents: ActivationCache, tmp_path: Path) -> None:
    dictionary = _topk()
    dictionary.metadata["tokens"] = {**many_documents.manifest.tokens, "masked_positions": 0}
    write_report(evaluate(dictionary, many_documents, hook=HOOK), tmp_path)
    assert "Training left out other tokens" in (tmp_path / "eval.md").read_text()


def test_evaluation_leaves_the_dictionary_alone_and_reports_progress(many_documents: ActivationCache) -> None:
    dictionary = _topk()
    before = {name: tensor.clone() for name, tensor in dictionary.state_dict().items()}
    seen: dict[str, list[tuple[int, int]]] = {}
    evaluate(
        dictionary,
        many_documents,
        hook=HOOK,
        progress=lambda stage, done, of: seen.setdefault(stage, []).append((done, of)),
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in dictionary.state_dict().items())
    for stage in ("activations", "reconstruction", "baselines"):
        done, of = seen[stage][-1]
        assert done == of, stage


def _sized(d_sae: int, k: int, seed: int) -> TopK:
    dictionary = TopK(32, d_sae, k=k).requires_grad_(False)
    rows = torch.randn(d_sae, 32, generator=torch.Generator().manual_seed(seed))
    dictionary.W_dec.copy_(torch.nn.functional.normalize(rows, dim=-1))
    dictionary.W_enc.copy_(dictionary.W_dec.T)
    return dictionary


def test_several_dictionaries_get_the_reports_that_each_gets_alone(
    many_documents: ActivationCache, language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the model runs up to the hook point once a batch, and on from it once for each thing that differs.

    By default losses are of two batches, and before them comes one probe.
    """
    dictionaries = {"a": _sized(64, 4, 0), "b": _sized(64, 4, 1), "c": _sized(48, 4, 2), "identity": _sized(64, 3, 3)}
    alone = {
        name: evaluate(dictionary, many_documents, hook=HOOK, language_model=language_model).to_json()
        for name, dictionary in dictionaries.items()
    }
    replaced: list[int] = []
    original = language_model.replaced_logits

    def replaced_logits(tokens: Any, hook: str, replacements: Any) -> Any:
        replaced.append(len(replacements))
        return original(tokens, hook, replacements)

    monkeypatch.setattr(language_model, "replaced_logits", replaced_logits)
    together = evaluate_all(dictionaries, many_documents, hook=HOOK, language_model=language_model)
    assert list(together) == list(dictionaries)
    for name, report in together.items():
        expected, found = alone[name], report.to_json()
        assert found.pop("seconds") > 0 and expected.pop("seconds") > 0
        assert found == expected, name
    # clean, zero, mean, four dictionaries, PCA of 4 and of 3 components, random dictionaries and frozen decoders of
    # three sizes; by legacy rules clean, zero, four dictionaries in two ways, in the one whole batch
    assert replaced == [*[3 + 4 + 2 + 3 + 3] * 2, 2 + 2 * 4]


def test_documents_file_gives_the_estimates_again(report: Report, tmp_path: Path) -> None:
    """Every metric of eval.json is a ratio of what the file beside it holds."""
    write_report(report, tmp_path)
    totals = load_file(tmp_path / "eval-documents.safetensors")
    assert {len(column) for column in totals.values()} == {len(report.scores.totals["tokens"])}
    written = json.loads((tmp_path / "eval.json").read_text())
    for name in METRICS:
        made = estimate(name, totals)
        assert made.to_json() == pytest.approx(written[name], rel=1e-12), name
    assert int(totals["tokens"].sum()) == written["evaluated"]["tokens"]
    assert int((totals["tokens"] > 0).sum()) == written["evaluated"]["documents"]
    assert int(totals["positions"].sum()) == written["evaluated"]["downstream_tokens"]


def test_no_dictionary_is_refused(many_documents: ActivationCache) -> None:
    with pytest.raises(ConfigError, match="there is no dictionary to evaluate; give at least one"):
        evaluate_all({}, many_documents, hook=HOOK)


def _stored(report: Report, folder: Path, **changed: Any) -> Any:
    asked = {"dictionary": report.dictionary, "activations": report.activations} | {
        key: value for key, value in changed.items() if key in ("dictionary", "activations")
    }
    return read_stored(
        folder, **asked, hook=changed.get("hook", report.hook), settings=changed.get("settings", report.settings)
    )


def test_what_is_stored_of_just_this_is_read(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    found = _stored(report, tmp_path)
    assert found is not None
    record, totals = found
    assert record == report.to_json()
    assert torch.equal(totals["error"], report.scores.totals["error"])


def test_anything_that_decides_the_numbers_makes_a_stored_report_stale(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(report, tmp_path)
    stale: dict[str, dict[str, Any]] = {
        "weights": {"dictionary": {**report.dictionary, "weights_sha256": "0" * 64}},
        "k": {"dictionary": {**report.dictionary, "k": 5}},
        "number type": {"dictionary": {**report.dictionary, "dtype": "float16"}},
        "activations": {"activations": "0" * 64},
        "hook": {"hook": "blocks.2.hook_mlp_out"},
        **{
            f"evaluation.{key}": {"settings": EvaluationConfig(**{key: value})}
            for key, value in {
                "tokens": 96, "downstream_tokens": 64, "baseline_tokens": None, "frozen_decoder_tokens": 500,
                "baseline_reconstruction_tokens": 64, "legacy_tokens": 0, "batch_contexts": 3,
            }.items()
        },
    }  # fmt: skip
    assert {key.partition(".")[2] for key in stale if "." in key} == set(EvaluationConfig.model_fields)
    for what, changed in stale.items():
        assert _stored(report, tmp_path, **changed) is None, what
    assert _stored(report, tmp_path) is not None
    monkeypatch.setattr("sae.files.version.__version__", "0.0.0")
    assert _stored(report, tmp_path) is None, "version of the package"


@pytest.mark.parametrize("name", ["eval.json", "eval.md", "eval-documents.safetensors"])
def test_a_stored_report_that_is_not_whole_is_stale(report: Report, tmp_path: Path, name: str) -> None:
    write_report(report, tmp_path)
    (tmp_path / name).unlink()
    assert _stored(report, tmp_path) is None


@pytest.mark.parametrize("name", ["eval.json", "eval.md", "eval-documents.safetensors"])
def test_a_damaged_one_is_named(report: Report, tmp_path: Path, name: str) -> None:
    write_report(report, tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
    with pytest.raises(DamagedError, match=rf"{name}': damaged or changed: .*; delete it and run the same 'sae run"):
        _stored(report, tmp_path)


@pytest.mark.parametrize("step", range(1, 4))
def test_killed_while_a_report_is_written_there_is_none(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Neither the old one, which has lost files, nor the new one."""
    write_report(report, tmp_path)
    other = dataclasses.replace(report, hook="another", scores=report.baselines["pca"])
    done = [0]

    def killed(write: Any) -> Any:
        def act(*arguments: Any) -> None:
            done[0] += 1
            if done[0] == step:
                raise KeyboardInterrupt
            write(*arguments)

        return act

    with monkeypatch.context() as patch:
        for name in ("write_chunks", "write_json"):
            patch.setattr(module, name, killed(getattr(module, name)))
        patch.setattr("sae.evaluation.figures.draw_figures", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            write_report(other, tmp_path)
    assert _stored(report, tmp_path) is None and _stored(report, tmp_path, hook="another") is None
    assert verify(tmp_path)[1] == []
    write_report(report, tmp_path)
    assert _stored(report, tmp_path) is not None


def test_a_report_that_cannot_be_rendered_leaves_the_one_before(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(report, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    monkeypatch.setattr("sae.evaluation.stored.markdown", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(dataclasses.replace(report, hook="another"), tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


@pytest.mark.filterwarnings("ignore::sae.files.hashes.UnhashedWarning")
def test_sums_of_another_report_are_stale_and_named(report: Report, tmp_path: Path) -> None:
    """As a kill left them while eval.json stayed in its place."""
    write_report(report, tmp_path)
    documents = tmp_path / "eval-documents.safetensors"
    write_bytes(documents, dataclasses.replace(report, scores=report.baselines["pca"]).documents_content())
    assert _stored(report, tmp_path) is None
    [problem] = verify(tmp_path)[1]
    assert f"{documents}': its SHA-256 is not the one in eval.json" in problem
    (tmp_path / "SHA256SUMS").unlink()
    with pytest.raises(DamagedError, match="not the one in eval"):
        _stored(report, tmp_path)


def test_one_of_another_format_is_stale(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    record = json.loads((tmp_path / "eval.json").read_text())
    for key, value in (("format", "another"), ("format_version", 1)):
        write_json(tmp_path / "eval.json", {**record, key: value})
        assert _stored(report, tmp_path) is None, key
