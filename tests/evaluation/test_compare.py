from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import sae
from sae.activations import ActivationCache
from sae.architectures import TopK
from sae.config.settings import EvaluationConfig
from sae.dictionary.saved import identify
from sae.errors import ConfigError, DamagedError, FormatError
from sae.evaluation import Comparison, comparison_tables, evaluate, read_comparison, write_comparison
from sae.evaluation.comparison import _baselines, comparison_key
from sae.evaluation.comparison_view import _heading
from sae.evaluation.metrics import METRICS, below_noise
from sae.model.language_model import LanguageModel
from sae.results.estimate import Estimate
from tests.support.evaluation_cache import make_cache, random_rows
from tests.support.fake_cache import HOOK


def _topk(seed: int, k: int = 4, d_in: int = 32) -> TopK:
    dictionary = TopK(d_in, 64, k=k).requires_grad_(False)
    rows = torch.randn(64, d_in, generator=torch.Generator().manual_seed(seed))
    dictionary.W_dec.copy_(torch.nn.functional.normalize(rows, dim=-1))
    dictionary.W_enc.copy_(dictionary.W_dec.T)
    return dictionary


class Theirs(nn.Module):
    """Somebody else's module: a dictionary of ours behind dense encode and decode."""

    def __init__(self, inner: TopK) -> None:
        super().__init__()
        self.inner = inner

    def encode(self, x: Tensor) -> Tensor:
        return self.inner.encode(x)

    def decode(self, features: Tensor) -> Tensor:
        return self.inner.decode(features)


@pytest.fixture(scope="module")
def comparison(many_documents: ActivationCache, language_model: LanguageModel) -> Comparison:
    return sae.compare(
        {"a": _topk(0), "b": _topk(1, k=6), "theirs": Theirs(_topk(0))}, many_documents, hook=HOOK,
        language_model=language_model,
    )  # fmt: skip


def test_each_has_the_numbers_of_its_own_evaluation(
    comparison: Comparison, many_documents: ActivationCache, language_model: LanguageModel
) -> None:
    alone = evaluate(_topk(1, k=6), many_documents, hook=HOOK, language_model=language_model).to_json()
    for name in METRICS:
        assert comparison.dictionaries["b"].metrics[name].to_json() == alone[name], name
    assert comparison.dictionaries["b"].dead == alone["dead"]["features"]
    assert comparison.evaluated["tokens"] == alone["evaluated"]["tokens"]
    assert comparison.dictionaries["a"].differences == {}


def test_differences_are_to_the_first(comparison: Comparison) -> None:
    a, b = comparison.dictionaries["a"], comparison.dictionaries["b"]
    assert comparison.first == "a"
    assert set(b.differences) == set(METRICS) - {"ce_clean", "ce_zero", "ce_mean"}, "those are the model's own"
    for name in b.differences:
        ours, theirs, found = a.metrics[name].value, b.metrics[name].value, b.differences[name]
        assert ours is not None and theirs is not None
        assert found.value == pytest.approx(theirs - ours, abs=1e-12), name
    fvu = b.differences["fvu"]
    assert fvu.standard_error is not None and fvu.standard_error < (b.metrics["fvu"].standard_error or 0)
    assert a.metrics["ce_clean"] == b.metrics["ce_clean"]
    assert below_noise(comparison.dictionaries["theirs"].differences["l0"]), "the same dictionary"
    assert b.differences["l0"].value == pytest.approx(2, abs=0.05) and not below_noise(b.differences["l0"])


def test_any_object_that_encodes_and_decodes_is_measured_alike(comparison: Comparison) -> None:
    ours, theirs = comparison.dictionaries["a"], comparison.dictionaries["theirs"]
    assert "Theirs, 32 → 64" in theirs.description
    for name in METRICS:
        assert theirs.metrics[name].value == pytest.approx(ours.metrics[name].value, rel=1e-3, abs=1e-4), name
    assert (theirs.features, theirs.dead, theirs.dense) == (ours.features, ours.dead, ours.dense)


def test_baselines_stand_there_once(comparison: Comparison) -> None:
    names = list(comparison.baselines)
    assert names == [
        "pca, L0 4", "pca, L0 6", "random, L0 4", "random, L0 6", "frozen_decoder, L0 4", "frozen_decoder, L0 6",
        "identity",
    ]  # fmt: skip
    assert comparison.baselines["identity"].metrics["fvu"].value == 0


def test_baselines_have_the_names_of_a_report(comparison: Comparison) -> None:
    kinds = dict.fromkeys(name.partition(",")[0] for name in comparison.baselines)
    assert list(kinds) == ["pca", "random", "frozen_decoder", "identity"]
    headings = [_heading(name) for name in comparison.baselines]
    assert headings[0] == "PCA, L0 4" and headings[4:] == ["frozen decoder, L0 4", "frozen decoder, L0 6", "identity"]
    assert _heading("PCA, L0 4") == "PCA, L0 4", "as earlier versions wrote them"


def record_of(l0: float, *, k: int, d_sae: int = 64, architecture: str = "topk") -> dict[str, Any]:
    """What `eval.json` says about baselines of a dictionary with this L0."""

    def part(description: str, features: int, l0: float) -> dict[str, Any]:
        return {"description": description, "features": features, "l0": Estimate(float(l0), 0.0).to_json()}

    return {
        "baselines": {
            "pca": part(f"PCA: {k} principal components, fitted on 741 tokens", k, k),
            "random": part(f"random: {d_sae:,} random directions, top {k}, one fitted gain ({l0})", d_sae, k),
            "frozen_decoder": part(f"frozen decoder: {architecture}, {d_sae:,} random directions, k = {k}", d_sae, l0),
            "identity": {"description": "identity: x̂ = x", "features": None},
        }
    }


@pytest.mark.parametrize(
    ("records", "names"),
    [
        ([record_of(16, k=16), record_of(16.8, k=17)], ["pca", "random", "frozen_decoder", "identity"]),
        (
            [record_of(16, k=16), record_of(17, k=17), record_of(18, k=18)],
            ["pca, L0 16", "pca, L0 18", "random, L0 16", "random, L0 18", "frozen_decoder, L0 16",
             "frozen_decoder, L0 18", "identity"],
        ),
        (
            [record_of(16, k=16), record_of(16, k=16, d_sae=128)],
            ["pca", "random, L0 16", "random, L0 16 (2)", "frozen_decoder, L0 16", "frozen_decoder, L0 16 (2)",
             "identity"],
        ),
        (
            [record_of(16, k=16), record_of(16.5, k=17, architecture="jumprelu")],
            ["pca", "random", "frozen_decoder, L0 16", "frozen_decoder, L0 16.5", "identity"],
        ),
    ],
    ids=["near", "chain", "other width", "other architecture"],
)  # fmt: skip
def test_of_baselines_with_nearly_the_same_l0_the_first_stays(records: list[dict[str, Any]], names: list[str]) -> None:
    baselines = _baselines({str(number): record for number, record in enumerate(records)})
    assert list(baselines) == names
    for name, entry in baselines.items():
        if "L0" in name:
            assert f", L0 {entry.metrics['l0'].value:.3g}" in name, "its own number"


def test_a_stored_comparison_is_read_by_its_folder(comparison: Comparison, tmp_path: Path) -> None:
    assert read_comparison(tmp_path) is None
    write_comparison(comparison, tmp_path)
    assert read_comparison(tmp_path) == comparison


def test_json_and_back(comparison: Comparison, tmp_path: Path) -> None:
    write_comparison(comparison, tmp_path)
    written = json.loads((tmp_path / "compare.json").read_text(), parse_constant=pytest.fail)
    assert Comparison.from_json(written) == comparison
    assert written["dictionaries"]["b"]["differences"]["l0"]["below_noise"] is False
    assert written["dictionaries"]["theirs"]["differences"]["l0"]["below_noise"] is True


def test_markdown_states_tokens_policy_and_noise(comparison: Comparison, tmp_path: Path) -> None:
    write_comparison(comparison, tmp_path)
    text = (tmp_path / "compare.md").read_text()
    counts = comparison.evaluated
    assert f"the same {counts['tokens']:,} held-out tokens of {counts['documents']:,} documents" in text
    assert f"left out are {counts['masked_tokens']:,} tokens: the first position of every context" in text
    assert "≈: below noise, its 95 % interval holds 0" in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 2
    for table in tables:
        assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    l0 = next(line for line in tables[0] if line.startswith("| `l0`")).split("|")
    assert "≈" not in l0[4] and "<br>+2" in l0[4]
    assert "<br>≈ +0 ± 0" in l0[5]


def test_terminal_tables(comparison: Comparison) -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    for table in comparison_tables(comparison):
        console.print(table)
    console.file.close()
    text = console.export_text()
    for name in (*METRICS, "dead", "dense", "PCA, L0 4", "frozen decoder, L0 6", "identity", "theirs"):
        assert name in text, name
    assert "second lines: difference to a ±" in " ".join(text.split())


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, random_rows(150, 6, 9))
    with pytest.raises(ConfigError, match="1 dictionaries to compare: give two at least"):
        sae.compare({"a": _topk(0, d_in=6)}, cache, hook=HOOK)
    with pytest.raises(ConfigError, match=r"theirs: Theirs does not encode and decode activations \[2, 6\] of 'blocks"):
        sae.compare({"a": _topk(0, d_in=6), "theirs": Theirs(_topk(0, d_in=7))}, cache, hook=HOOK)

    class Odd:
        def encode(self, x: Tensor) -> Tensor:
            return x.sum(-1)

        def decode(self, features: Tensor) -> Tensor:
            return features

    with pytest.raises(ConfigError, match=r"odd: Odd made features \[2\] and reconstructions \[2\] of activations"):
        sae.compare({"a": _topk(0, d_in=6), "odd": Odd()}, cache, hook=HOOK)
    broken = Theirs(_topk(0, d_in=6))
    broken.inner.b_enc[1] = float("inf")
    with pytest.raises(FormatError, match=r"broken: inner\.b_enc has values that are infinite"):
        sae.compare({"a": _topk(0, d_in=6), "broken": broken}, cache, hook=HOOK)


def test_an_object_without_weights_and_signed_features(tmp_path: Path) -> None:
    class Signed:
        def encode(self, x: Tensor) -> Tensor:
            return x - 5

        def decode(self, features: Tensor) -> Tensor:
            return features + 5

    x, tokens, documents = random_rows(150, 6, 9)
    report = evaluate(Signed(), make_cache(tmp_path, (x, tokens, documents)), hook=HOOK)
    assert report.dictionary["weights_sha256"] is None
    assert report.scores.reconstruction.fvu.value == pytest.approx(0, abs=1e-12)
    assert report.scores.sparsity is not None and report.scores.sparsity.l0.value == 6


def _key(**changed: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {
        "identities": {"a": identify(_topk(0)), "b": identify(_topk(1))}, "activations": "0" * 64, "hook": HOOK,
        "settings": EvaluationConfig(),
    }  # fmt: skip
    return comparison_key(**{**asked, **changed})


@pytest.mark.parametrize(
    "changed",
    [
        {"identities": {"a": identify(_topk(0)), "b": identify(_topk(2))}},
        {"identities": {"a": identify(_topk(0)), "b": identify(_topk(1, k=3))}},
        {"identities": {"b": identify(_topk(1)), "a": identify(_topk(0))}},
        {"identities": {"a": identify(_topk(0)), "c": identify(_topk(1))}},
        {"activations": "1" * 64},
        {"hook": "blocks.2.hook_resid_pre"},
        {"settings": EvaluationConfig(tokens=100)},
        {"settings": EvaluationConfig(legacy_tokens=0)},
        {"settings": EvaluationConfig(frozen_decoder_tokens=0)},
    ],
)
def test_a_comparison_of_anything_else_is_not_read(
    comparison: Comparison, tmp_path: Path, changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    write_comparison(dataclasses.replace(comparison, key=_key()), tmp_path)
    assert read_comparison(tmp_path, _key()) is not None
    assert read_comparison(tmp_path, _key(**changed)) is None
    monkeypatch.setattr("sae.files.version.__version__", "0.0.0")
    assert read_comparison(tmp_path, _key()) is None


def test_killed_while_a_comparison_is_written_there_is_none(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    write_comparison(dataclasses.replace(comparison, key=_key()), tmp_path)
    monkeypatch.setattr("sae.files.kept.write_json", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception, match="killed"):
        write_comparison(dataclasses.replace(comparison, key={"another": 1}), tmp_path)
    assert read_comparison(tmp_path, _key()) is None, "compare.md is of the other"


def test_a_comparison_cut_short_or_without_hashes_is_not_read(comparison: Comparison, tmp_path: Path) -> None:
    import dataclasses

    write_comparison(dataclasses.replace(comparison, key=_key()), tmp_path)
    (tmp_path / "compare.md").unlink()
    assert read_comparison(tmp_path, _key()) is None
    unhashed = _key(identities={"a": identify(_topk(0)), "b": {"architecture": "Theirs", "weights_sha256": None}})
    write_comparison(dataclasses.replace(comparison, key=unhashed), tmp_path)
    assert read_comparison(tmp_path, unhashed) is None
    (tmp_path / "compare.json").write_text("{")
    with pytest.raises(DamagedError, match=r"compare.json': damaged or changed: .*run the same 'sae compare' again"):
        read_comparison(tmp_path, _key())
