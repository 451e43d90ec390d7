"""The page of a text's features: data that stays data, colours, keys, and a narrow screen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sae.features.text_features import Firing, KnownFeature, TextFeature, TextFeatures, TextToken
from sae.viewer.text_page import text_page_data, write_text_page
from sae.viewer.text_terminal import print_text_features
from tests.viewer.test_page import Elements, expect

EVIL = "</script><img src=x onerror=document.body.remove()><!--[bold]\x1b[31m"
TOKENS = ["<bos>", " import", EVIL, "\n", "", "é"]
ACTIVATIONS = {7: (0.0, 4.0, 0.0, 1.0, 0.0, 0.0), 11: (0.0, 0.0, 2.5, 0.0, 0.0, 0.5), 3: (0.0,) * 6}


KNOWN = KnownFeature(0.02, 9.0, 2.25, (" import", EVIL))


def result(known: KnownFeature | None = KNOWN) -> TextFeatures:
    """Of three features, one of which does not fire."""
    tokens = tuple(
        TextToken(
            number, text, number == 0,
            tuple(Firing(j, row[number]) for j, row in ACTIVATIONS.items() if row[number]),
        )
        for number, text in enumerate(TOKENS)
    )  # fmt: skip
    features = tuple(
        TextFeature(j, max(row), row.index(max(row)) if max(row) else None, sum(map(bool, row)), row, known)
        for j, row in ACTIVATIONS.items()
    )
    return TextFeatures("blocks.1.hook_resid_pre", 64, tokens, features, 2)


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    write_text_page([result()], tmp_path / "page.html", "</title><script>alert(1)</script>")
    content = (tmp_path / "page.html").read_text(encoding="utf-8")
    elements = Elements(content)
    assert elements.names.count("script") == 2
    assert not {"img", "link", "iframe", "base", "object"} & set(elements.names)
    assert not [name for name, _ in elements.attributes if name in ("src", "href") or name.startswith("on")]
    assert "default-src 'none'" in content and "unsafe" not in content and "{{" not in content


def test_the_data_of_the_page() -> None:
    data = text_page_data([result(None)], per_token=1)["texts"][0]
    assert data["tokens"] == TOKENS
    assert (data["masked"], data["fire"]) == ([0], [0, 1, 1, 1, 0, 1])
    assert data["firing"] == [[], [[7, 4.0]], [[11, 2.5]], [[7, 1.0]], [], [[11, 0.5]]]
    assert data["features"] == [
        {"i": 7, "x": 4.0, "a": [[1, 4.0], [3, 1.0]]}, {"i": 11, "x": 2.5, "a": [[2, 2.5], [5, 0.5]]},
        {"i": 3, "x": 0.0, "a": []},
    ]  # fmt: skip


Open = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens the page in a browser; it may complain about nothing and load nothing."""
    problems: list[str] = []
    pages = []

    def open_page(*results: TextFeatures, width: int = 1100) -> Any:
        write_text_page(results or [result()], tmp_path / "page.html", "A text")
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append("dialog"))
        page.on("request", lambda request: None if request.url.startswith("file:") else problems.append(request.url))
        page.goto((tmp_path / "page.html").as_uri())
        pages.append(page)
        return page

    yield open_page
    assert problems == []
    for page in pages:
        page.close()


def shares(page: Any) -> dict[str, float]:
    """How strongly tokens are coloured, by their places."""
    return page.locator("#text .fires").evaluate_all(
        "nodes => Object.fromEntries(nodes.map(node => "
        "[node.id, Number(getComputedStyle(node).getPropertyValue('--share'))]))"
    )


def test_a_chosen_feature_colours_the_text(opened: Open) -> None:
    page = opened()
    assert shares(page) == {"token-1": 1.0, "token-3": pytest.approx(0.12 + 0.88 / 4, abs=2e-3)}
    assert page.locator("#features button").nth(0).get_attribute("aria-pressed") == "true"
    page.locator("#features button").nth(1).click()
    assert shares(page) == {"token-2": 1.0, "token-5": pytest.approx(0.12 + 0.88 / 5, abs=2e-3)}
    assert [one.get_attribute("aria-pressed") for one in page.locator("#features button").all()] == [
        "false",
        "true",
        "false",
    ]
    assert page.locator("#where li").count() == 2
    assert page.locator("#where .amount").all_text_contents() == ["2.50", "0.500"]
    page.locator("#features button").nth(2).click()
    assert shares(page) == {}
    expect(page.locator("#where")).to_have_text("Nowhere in this text.")


def test_hostile_tokens_are_text_and_masked_ones_are_marked(opened: Open) -> None:
    page = opened()
    assert page.locator("img").count() == 0
    assert page.locator("#token-2").inner_text().startswith("</script><img src=x onerror")
    assert page.locator("#token-0").get_attribute("class") == "masked"
    assert page.locator("#token-4").inner_text() == "◌"
    assert "1 of 6 tokens masked" in page.locator("#legend").inner_text()


def test_keys_and_clicks_choose_tokens(opened: Open) -> None:
    page = opened()
    page.locator("#token-3").click()
    expect(page.locator("#token .hint")).to_contain_text("3: ↵ 1 features fire")
    page.locator("#text").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#token .hint")).to_contain_text("2: </script>")
    assert page.locator("#text").get_attribute("aria-activedescendant") == "token-2"
    assert page.locator("#token-2").get_attribute("aria-selected") == "true"
    page.locator("#token button").click()
    assert shares(page).keys() == {"token-2", "token-5"}
    for _ in range(4):
        page.keyboard.press("Tab")
    page.locator("#text").focus()
    for _ in range(9):
        page.keyboard.press("ArrowLeft")
    expect(page.locator("#token .hint")).to_contain_text("0: <bos> masked: left out of training")


def test_several_texts(opened: Open) -> None:
    page = opened(result(), TextFeatures("h", 64, (TextToken(5, "other", False, ()),), (), 0))
    page.locator("#which").select_option("1")
    assert page.locator("#text [role=option]").all_text_contents() == ["other"]
    expect(page.locator("#features")).to_have_text("No feature fires on this text.")
    assert opened().locator("#choice").is_hidden()


@pytest.mark.parametrize("width", [320, 420, 760])
def test_a_narrow_screen_needs_no_sideways_scrolling(opened: Open, width: int) -> None:
    long = TextFeatures(
        "blocks.1.hook_resid_pre", 64,
        (*result().tokens, TextToken(9, "x" * 300, False, ()), TextToken(9, " " * 300, False, ())),
        tuple(dataclasses.replace(one, activations=(*one.activations, 0.0, 0.0)) for one in result().features), 2,
    )  # fmt: skip
    page = opened(long, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_every_control_has_a_name(opened: Open) -> None:
    """Of buttons, of the list of tokens and of its options, as assistive technology gets them."""
    page = opened()
    tree = page.locator("body").aria_snapshot()
    assert 'listbox "Text"' in tree
    assert 'button "7 4.00, 2 tokens' in tree
    assert 'option " import, 4.00"' in tree or 'option "import, 4.00"' in tree
    assert "- button\n" not in tree


def test_the_terminal_shows_tokens_literally() -> None:
    console = Console(width=100, record=True, markup=False)
    print_text_features(result(), console)
    shown = console.export_text()
    assert "[bold]" in shown and "\x1b" not in shown
    rows = [line.split() for line in shown.splitlines()]
    assert ["0", "<bos>", "masked"] in rows
    assert ["5", "é", "1", "11", "0.500"] in rows
    assert next(row for row in rows if row[:2] == ["3", "–"])[:4] == ["3", "–", "–", "0"]
    assert "7: « import»" in shown and "‹↵›" in shown
