"""Searches of a store against a slow reading of every feature; labels that a user keeps, and their errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae.errors import FormatError
from sae.features import Feature, Features
from sae.features.search import BEGINS, CONTAINS, EXACT, quality_of


def fires_on(feature: Feature, query: str) -> tuple[int, int, int] | None:
    """Quality, examples and all examples, from the feature as the store shows it."""
    examples = [*feature.top, *(example for group in feature.quantiles for example in group)]
    qualities = []
    for example in examples:
        firing = [token for token, value in zip(example.tokens, example.activations, strict=True) if value > 0]
        qualities.append({quality for token in firing if (quality := quality_of(token, query)) is not None})
    best = min((quality for found in qualities for quality in found), default=None)
    return None if best is None else (best, sum(best in found for found in qualities), len(examples))


@pytest.mark.parametrize("query", ["\x07", "\x10", "\x05"])
def test_firing_tokens_are_counted_as_in_the_examples(features: Features, query: str) -> None:
    """Tokens of this store are single bytes, and most features fire on most of them."""
    hits = {hit.feature: hit for hit in features.search(query)}
    found = 0
    for feature in features:
        expected = fires_on(feature, query)
        reasons = [reason.text for reason in hits[feature.index].reasons] if feature.index in hits else []
        firing = [text for text in reasons if text.startswith("fires on")]
        if expected is None:
            assert not firing
            continue
        found += 1
        assert hits[feature.index].reasons[0].quality == expected[0]
        assert firing[0].endswith(f"in {expected[1]} of {expected[2]} examples")
    assert found >= 2
    counts = [
        int(hit.why.split(" in ")[1].split()[0]) / int(hit.why.split(" of ")[1].split()[0]) for hit in hits.values()
    ]
    assert counts == sorted(counts, reverse=True)


def test_qualities() -> None:
    found = {text: quality_of(text, "par") for text in (" Par", "Paris", "compare", "P", " par ")}
    assert found == {" Par": EXACT, "Paris": BEGINS, "compare": CONTAINS, "P": None, " par ": EXACT}
    assert [quality_of(text, " par") for text in (" Par", "Par", " Paris")] == [EXACT, None, BEGINS]


def test_nothing_is_found_for_nothing(features: Features) -> None:
    assert features.search(" ") == [] == features.search("no such token anywhere")


def test_a_number_finds_its_feature_first(features: Features) -> None:
    assert features.search("#5")[0].feature == 5
    assert features.search("5")[0].why.startswith("feature 5")
    assert not any(hit.why.startswith("feature") for hit in features.search("8")), "there are 8, from 0 on"


def test_labels_are_searched_and_rank_before_tokens(features: Features) -> None:
    (features.path / "labels.csv").write_text('feature,label\n5,"names, of cities"\n2,capacities\n\n0,\n')
    assert features.labels == {5: "names, of cities", 2: "capacities"}
    hits = features.search("CITIES")
    assert [(hit.feature, hit.why) for hit in hits] == [
        (5, "label 'names, of cities'"), (2, "label 'capacities'"),
    ]  # fmt: skip


def test_labels_may_be_json_and_lie_in_the_run_folder(features: Features) -> None:
    (features.path.parent / "labels.json").write_text('{"3": " one\\nline ", "4": ""}')
    assert Features(features.path).labels == {3: "one line"}
    assert Features(features.path.parent).search("one line")[0].feature == 3


def test_labels_of_any_characters(features: Features, tmp_path: Path) -> None:
    """Line ends and separators in quotes, which str.splitlines would cut; half of a surrogate pair becomes `?`."""
    content = 'feature,label\r\n5,"names\u2028of\x0ccities,\r\ntowns"\r\n2,a\x1cb\r\n'
    (features.path / "labels.csv").write_bytes(content.encode())
    assert features.labels == {5: "names of cities, towns", 2: "a b"}
    (features.path / "labels.csv").unlink()
    (features.path / "labels.json").write_text(r'{"3": "river \ud800 bank"}')
    again = Features(features.path)
    assert again.labels == {3: "river ? bank"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels.json", "[1]", "not an object; labels.json is"),
        ("labels.json", "[]", "not an object; labels.json is"),
        ("labels.json", '{"1": {"2": "a"}}', "is not a text"),
        ("labels.json", '{"1": "a"', "not JSON"),
        ("labels.json", '{"1": 2}', "entry 1: 2 is not a text"),
        ("labels.json", '{"1": "a", "8": "b"}', "entry 2: '8' is not a feature; the store has 0 to 7"),
        ("labels.json", '{"1": "a", "01": "b"}', "entry 2: feature 1 has a label already; keep one"),
        ("labels.csv", "1,a\n", "no line 'feature,label' at its beginning"),
        ("labels.csv", "feature,label\n1,a,b\n", "line 2: 3 values, expected 2; put a label with commas in quotes"),
        ("labels.csv", "feature,label\n\n-1,a\n", "line 3: '-1' is not a feature"),
    ],
)
def test_wrong_labels_are_refused_with_their_place(features: Features, name: str, content: str, message: str) -> None:
    (features.path / name).write_text(content)
    with pytest.raises(FormatError) as refused:
        _ = features.labels
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_two_files_of_labels_are_refused(features: Features) -> None:
    for name in ("labels.json", "labels.csv"):
        (features.path / name).write_text("")
    with pytest.raises(FormatError, match="keep one of these files"):
        features.search("a")


def test_promoted_and_suppressed_tokens(features_with_logits: Features) -> None:
    store = features_with_logits
    for feature in store:
        assert feature.promoted and feature.suppressed
        for verb, entries in (("promotes", feature.promoted), ("suppresses", feature.suppressed)):
            text = next(entry.token for entry in entries if entry.token.strip())
            hit = next(hit for hit in store.search(text) if hit.feature == feature.index)
            assert any(reason.text.startswith(verb) for reason in hit.reasons), (text, hit.why)
    hits = store.search(next(entry.token for entry in store[6].promoted or [] if entry.token.strip()))
    assert [hit.feature for hit in hits if hit.dead] == [6]
    assert hits[-1].feature == 6, "a dead feature comes last"


@pytest.fixture
def features_with_logits(case, tmp_path: Path) -> Features:
    from types import SimpleNamespace

    import torch

    from tests.support.feature_case import D_SAE

    unembedding = torch.randn(D_SAE, 257, generator=torch.Generator().manual_seed(0))
    model = SimpleNamespace(is_residual=lambda hook: True, unembedding=lambda: unembedding)
    return case.collect(tmp_path / "with-logits", language_model=model)
