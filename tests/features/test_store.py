from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae.errors import CacheError, ConfigError, FormatError, SaeError, UnknownFeatureError
from sae.features import Features
from sae.files.writing import write_json
from tests.support.feature_case import D_SAE, DEAD, SETTINGS, Case


def test_a_store_opens_by_itself_and_by_its_run_folder(features: Features) -> None:
    assert list(Features(features.path)) == list(features)
    assert list(Features(features.path.parent)) == list(features)
    assert len(features) == D_SAE


def test_the_index_says_what_the_store_is(case: Case, features: Features) -> None:
    info = json.loads((features.path / "features.json").read_text())
    assert info["format"] == "sae-features"
    assert info["hook"] == "blocks.1.hook_resid_pre"
    assert info["model"] == "fake"
    assert info["activations"] == case.cache.manifest.identity(info["hook"])
    assert info["rows"] == 403
    assert info["tokens"] == case.reference.tokens
    assert info["settings"] == SETTINGS.model_dump()
    assert len(info["dictionary_sha256"]) == 64
    for file in ("features.safetensors", "tokens.safetensors"):
        assert set(load_file(features.path / file)) <= set(info["columns"][file])


def test_another_dictionary_has_another_identity(case: Case, features: Features, tmp_path: Path) -> None:
    assert case.collect(tmp_path / "same").info == features.info
    with torch.no_grad():
        case.dictionary.b_dec[0] = 1e-3
    assert case.collect(tmp_path / "other").info["dictionary_sha256"] != features.info["dictionary_sha256"]


def test_the_store_holds_the_scanned_tokens(case: Case, features: Features) -> None:
    text = load_file(features.path / "tokens.safetensors")
    assert text["tokens"].tolist() == case.tokens
    lengths = torch.diff(text["document_start"], append=torch.tensor([403]))
    assert text["document"].repeat_interleave(lengths).tolist() == case.reference.documents


def test_summary_and_order(case: Case, features: Features) -> None:
    summary = features.summary()
    assert summary.count.tolist() == [feature.count for feature in features]
    assert summary.density.tolist() == [feature.density for feature in features]
    assert summary.dead.tolist() == [index == DEAD for index in range(D_SAE)]
    for column in ("density", "max", "count", "mean"):
        order = features.sorted_by(column)
        values = getattr(summary, column)[order].tolist()
        assert order[-1] == DEAD
        assert values == sorted(values, reverse=True)
    rising = features.sorted_by("count", descending=False)
    assert rising[0] == 5, "the rarest living feature comes first, the dead one last"
    assert rising[-1] == DEAD
    assert features.sorted_by("index") == [0, 1, 2, 3, 4, 5, 7, DEAD]
    with pytest.raises(ConfigError, match="column 'size': features are sorted by density, max, count, index, mean"):
        features.sorted_by("size")


def test_peek_adds_up_the_firing_tokens(features: Features) -> None:
    feature = features[0]
    totals: dict[str, float] = {}
    for example in feature.top:
        token = example.tokens[example.position]
        totals[token] = totals.get(token, 0) + example.value
    assert [totals[token] for token in feature.peek] == sorted(totals.values(), reverse=True)


@pytest.mark.parametrize("index", [-1, D_SAE, 10**9])
def test_a_feature_that_is_not_there(features: Features, index: int) -> None:
    with pytest.raises(UnknownFeatureError, match=f"feature {index}: the store has features 0 to 7") as caught:
        features[index]
    assert isinstance(caught.value, SaeError)
    assert isinstance(caught.value, IndexError)


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no features\.json there; make them with 'sae run"):
        Features(tmp_path)


@pytest.mark.parametrize("name", ["features.safetensors", "tokens.safetensors"])
@pytest.mark.parametrize("damage", ["gone", "short", "noise"])
def test_damaged_tensors(features: Features, name: str, damage: str) -> None:
    file = features.path / name
    content = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes(content[: len(content) // 2] if damage == "short" else b"\xff" * len(content))
    with pytest.raises(FormatError, match=f"{name}.*run the same 'sae features' to make the store again"):
        Features(features.path)


@pytest.mark.parametrize(("name", "column"), [("documents.json", "documents"), ("vocabulary.json", "vocabulary")])
def test_damaged_texts(features: Features, name: str, column: str) -> None:
    (features.path / name).write_text("{")
    with pytest.raises(FormatError, match=f"{name}.*make the store again"):
        getattr(Features(features.path), column)


def test_files_of_two_collections_do_not_mix(case: Case, features: Features, tmp_path: Path) -> None:
    other = case.collect(tmp_path / "other", SETTINGS.model_copy(update={"tokens": 120}))
    (other.path / "tokens.safetensors").replace(features.path / "tokens.safetensors")
    with pytest.raises(FormatError, match=r"tokens.safetensors': damaged or changed"):
        Features(features.path)


def test_foreign_and_newer_indices(features: Features) -> None:
    index = features.path / "features.json"
    record = json.loads(index.read_text())
    write_json(index, {**record, "format_version": 99})
    with pytest.raises(FormatError, match=r"format version 99 is newer than this package reads \(1\); update"):
        Features(features.path)
    write_json(index, {**record, "format": "other"})
    with pytest.raises(FormatError, match="not of this toolkit"):
        Features(features.path)
    write_json(index, {key: value for key, value in record.items() if key != "rows"})
    with pytest.raises(FormatError, match=r"damaged \(rows: Field required\)"):
        Features(features.path)


def test_a_folder_that_cannot_be_written_is_an_error_and_an_interrupted_store_is_none(
    case: Case, features: Features, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cannot write"):
        case.collect(tmp_path / "file" / "features")
    (features.path / "features.json").unlink()
    with pytest.raises(FormatError, match=r"no features\.json"):
        Features(features.path)


def test_a_collection_replaces_the_one_before(case: Case, features: Features) -> None:
    again = case.collect(features.path, SETTINGS.model_copy(update={"top": 2}))
    assert max(len(feature.top) for feature in again) == 2
    assert not list(features.path.glob(".*")), "temporary files are left"
