"""The embedded default: a small version of the quickstart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sae
from sae.dictionary.model_identity import DEMO_FOLDER
from sae.text.corpus import is_held_out

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
SMALL = [
    "data.tokens=30000", "data.held_out_tokens=4000", "train.tokens=200000", "dictionary.d_sae=1024",
    "features.tokens=20000", "train.dead_after_tokens=20000",
]  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished `runs/quickstart` in it."""
    folder = tmp_path_factory.mktemp("workplace")
    config = sae.load_config(ROOT / "configs" / "quickstart.yaml", [f"out={folder / 'runs' / 'quickstart'}", *SMALL])
    sae.run(config)
    return folder


def test_a_small_quickstart_beats_its_baselines(workplace: Path) -> None:
    report = json.loads((workplace / "runs" / "quickstart" / "eval.json").read_text())
    assert report["l0"]["value"] <= 32
    assert report["explained_variance"]["value"] > 0.6
    assert report["explained_variance"]["value"] > report["baselines"]["random"]["explained_variance"]["value"] + 0.1
    assert report["ce_clean"]["value"] < report["ce_spliced"]["value"] < report["ce_zero"]["value"]
    assert 0.5 < report["ce_recovered_zero"]["value"] < 1
    assert report["baselines"]["identity"]["fvu"]["value"] == 0


def test_evaluation_documents_are_new_to_model_and_dictionary(workplace: Path) -> None:
    cache = sae.ActivationCache(workplace / "runs" / "quickstart")
    for split, held_out in (("train", False), ("held_out", True)):
        names = {name.partition("#")[0] for name in cache.documents(split)}
        assert names
        assert all(is_held_out(name, 0, 0.1) is held_out for name in names)


def test_the_demo_model_is_as_good_as_its_card_says(workplace: Path) -> None:
    """Within 25 %: the quickstart's contexts are shorter and its held-out text is a part of the card's."""
    card = json.loads((DEMO_FOLDER / "metrics.json").read_text())["held_out_nats_per_token"]
    report = json.loads((workplace / "runs" / "quickstart" / "eval.json").read_text())
    assert report["ce_clean"]["value"] == pytest.approx(card["demo"], rel=0.25)
    assert card["demo"] < card["bigram, interpolated"] < card["unigram"]
    assert f"| demo | {card['demo']:.3f} |" in (DEMO_FOLDER / "README.md").read_text()


def test_the_demo_model_is_small() -> None:
    assert sum(path.stat().st_size for path in DEMO_FOLDER.iterdir()) < 16e6
