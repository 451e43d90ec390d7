"""Where documents are few, sections of them take their part: more examples than documents, none from one place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sae.activations.harvest import harvest
from sae.features.groups import ExampleGroups
from sae.model.language_model import LanguageModel
from tests.support.feature_case import CONTEXT, SETTINGS, build_case
from tests.support.feature_reference import Reference


def test_three_books_give_as_many_examples_as_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.features.groups.SECTION_TOKENS", 2 * CONTEXT)
    case = build_case(tmp_path / "cache", document_length=140)
    sections = [row // (2 * CONTEXT) * 3 + row // 140 for row in range(403)]
    reference = Reference(case.reference.codes, sections, case.reference.eligible, CONTEXT)
    features = case.collect(tmp_path / "store")
    for feature in features:
        expected = reference.top(feature.index, SETTINGS.top)
        assert [(example.value, example.row) for example in feature.top] == [(f.value, f.row) for f in expected]
    assert len(features[0].top) == SETTINGS.top > 3
    assert json.loads((tmp_path / "store" / "features.json").read_text())["one_example_per"] == "section"


@pytest.mark.parametrize(("documents", "unit"), [(9, "section"), (10, "document")])
def test_fewer_than_twice_the_examples_are_few(documents: int, unit: str, tmp_path: Path) -> None:
    case = build_case(tmp_path / "cache", rows=documents * 25, document_length=25)
    assert ExampleGroups.of(case.cache, SETTINGS).unit == unit
    scanned = SETTINGS.model_copy(update={"tokens": 25 * 9 - CONTEXT})
    assert ExampleGroups.of(case.cache, scanned).unit == "section"


def test_the_cache_knows_its_sections(tiny_config, language_model: LanguageModel, tmp_path: Path) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    for book in range(6):
        lines = [f"book {book}, line {line}, the river keeps a stone house.\n" for line in range(60)]
        (folder / f"{book}.txt").write_text("".join(lines))
    config = tiny_config(data__source=str(folder), data__section_characters=300, data__holdout_fraction=0.4)
    cache = harvest(config, language_model)
    sections = [part.sections for part in cache.contexts("train")]
    assert all(part is not None for part in sections)
    numbers = torch.cat([part.flatten() for part in sections if part is not None])
    texts = language_model.tokenizer.batch_decode(
        [torch.cat([cache.token_shard("train", n)[0] for n in range(cache.shards("train"))])[numbers == 1].tolist()],
        skip_special_tokens=True,
    )
    assert 300 <= len(texts[0]) < 360
    assert texts[0].endswith("house.\n")
    assert cache.d_in(cache.hooks[0]) == 32
