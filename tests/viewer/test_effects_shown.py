"""Effects beside features, in the terminal and on the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sae.effects import effects_beside
from sae.errors import FormatError
from sae.files.hashes import MissingWarning
from sae.files.writing import write_json
from sae.viewer import print_feature, write_page
from sae.viewer.page import page_data
from tests.support.effect_example import make_effects
from tests.viewer.test_page import Elements, expect
from tests.viewer.test_terminal import printed

EVIL = "</script><img src=x onerror=document.body.remove()>"


def beside(features, **options) -> None:
    """effects.json in the run folder that a store lies in, of its dictionary unless said otherwise."""
    options = {"sha": features.info["dictionary_sha256"], "hook": features.info["hook"], **options}
    write_json(features.path.parent / "effects.json", make_effects(**options).to_json())


def test_effects_of_this_dictionary_alone_are_shown(make_features) -> None:
    features = make_features("word")
    assert effects_beside(features) is None
    beside(features)
    effects = effects_beside(features)
    assert effects is not None and list(effects.features) == [0, 2, 3]
    beside(features, sha="0" * 64)
    assert effects_beside(features) is None, "another dictionary's"
    beside(features, hook="blocks.0.hook_mlp_out")
    assert effects_beside(features) is None, "another hook point's"
    (features.path.parent / "effects.json").unlink()
    with pytest.warns(MissingWarning, match="effects.json': missing, though SHA256SUMS lists it"):
        assert effects_beside(features) is None
    beside(features)
    (features.path.parent / "effects.json").write_text("{")
    with pytest.raises(FormatError, match="delete it and run the same 'sae effects' again"):
        effects_beside(features)


def test_lines_in_the_terminal(make_features) -> None:
    features, effects = make_features("word"), make_effects()
    lines = printed(print_feature, features[0]).splitlines()
    with_effects = printed(print_feature, features[0], effects=effects).splitlines()
    added = [line for line in with_effects if line not in lines]
    assert " ".join(" ".join(added).split()).startswith(
        "effect ablated at 64 places in 31 documents, nats: loss +0.250 ± 0.012 (direct +0.062 ± 0.012), next"
    )
    assert printed(print_feature, features[1], effects=effects) == printed(print_feature, features[1])


def test_data_of_the_page(make_features) -> None:
    features, effects = make_features("word"), make_effects(EVIL)
    data = page_data(features, range(4), "t", effects)
    entries = {entry["i"]: entry for entry in data["features"]}
    assert "e" in entries[0] and "e" not in entries[1]
    assert entries[0]["e"][0] == ["Δ loss there", "+0.250 ± 0.012"]
    assert entries[2]["e"][4] == ["Δ loss, direct", "–"]
    assert entries[3]["e"] == [["measured at", "0 places, 0 documents"]]
    assert data["changed"] == "ablated"
    assert "e" not in page_data(features, [0], "t")["features"][0]


def test_the_page_stays_whole(make_features, tmp_path: Path) -> None:
    write_page(make_features(), range(4), tmp_path / "page.html", "t", make_effects(EVIL))
    elements = Elements((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert elements.names.count("script") == 2 and "img" not in elements.names
    assert json.loads(next(script for script in elements.scripts if script.startswith("{")))["changed"] == "ablated"


def test_a_card_on_the_page(browser, make_features, tmp_path: Path) -> None:
    write_page(make_features("word"), range(4), tmp_path / "page.html", "t", make_effects())
    page = browser.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(f"{(tmp_path / 'page.html').as_uri()}#0")
    card = page.locator(".effect")
    assert card.locator("h3").inner_text().lower() == "effect on the model, ablated, nats"
    assert card.locator("dd").all_inner_texts() == [
        "+0.250 ± 0.012", "−0.125 ± 0.012", "0.125 ± 0.012", "0.002 ± 0.012", "+0.062 ± 0.012",
        "64 places, 31 documents",
    ]  # fmt: skip
    page.evaluate("location.hash = '1'")
    expect(page.locator("h2")).to_have_text("Feature 1")
    assert page.locator(".effect").count() == 0
    page.evaluate("location.hash = '3'")
    expect(page.locator(".effect dd")).to_have_text("0 places, 0 documents")
    assert problems == []
    page.close()
