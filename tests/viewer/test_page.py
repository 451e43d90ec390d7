from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sae.errors import UnknownFeatureError
from sae.viewer import write_page
from sae.viewer.page import embeddable_json, page_data, token_lengths
from tests.support.feature_cache import FakeTokenizer


class Elements(HTMLParser):
    """Elements of a page, and what stands in its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.scripts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        if self.names and self.names[-1] == "script":
            self.scripts.append(data)


def write(make_features, folder: Path, title: str = "A page", **settings) -> str:
    write_page(make_features(**settings), range(4), folder / "page.html", title)
    return (folder / "page.html").read_text(encoding="utf-8")


def test_json_in_a_script_element_cannot_end_it() -> None:
    content = {"text": "</script><!-- &lt; \u2028\u2029"}
    text = embeddable_json(content)
    assert not re.search("[<>&\u2028\u2029]", text)
    assert json.loads(text) == content


def test_hostile_tokens_and_titles_stay_data(make_features, tmp_path: Path) -> None:
    page = write(make_features, tmp_path, title="</title><script>alert(1)</script>{{data}}")
    elements = Elements(page)
    assert elements.names.count("script") == 2
    assert "img" not in elements.names
    data = next(json.loads(script) for script in elements.scripts if script.startswith("{"))
    assert any("</script><img" in example[4] for example in data["features"][0]["t"])


def test_a_list_of_hashes_beside_the_page_stays_as_it_is(make_features, tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  sub/file.bin\n", encoding="utf-8")
    write(make_features, tmp_path)
    assert (tmp_path / "SHA256SUMS").read_text(encoding="utf-8") == f"{'0' * 64}  sub/file.bin\n"
    (tmp_path / "SHA256SUMS").unlink()
    write(make_features, tmp_path)
    assert not (tmp_path / "SHA256SUMS").exists()


def test_the_page_needs_nothing_else(make_features, tmp_path: Path) -> None:
    page = write(make_features, tmp_path)
    elements = Elements(page)
    assert not {"link", "iframe", "img", "base", "object"} & set(elements.names)
    assert not [name for name, _ in elements.attributes if name in ("src", "href") or name.startswith("on")]
    assert "default-src 'none'" in page
    assert "unsafe" not in page
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)


def test_lengths_cut_the_text_into_its_tokens() -> None:
    assert token_lengths(["", "a", "é€", "😀"]) == "ABCC"
    assert token_lengths(["x" * 60, "x" * 61, "x" * 130]) == "8-A--I"


def test_pages_hold_the_features_asked_for_once(make_features, tmp_path: Path) -> None:
    features = make_features()
    assert [entry["i"] for entry in page_data(features, [2, 0, 2], "t")["features"]] == [2, 0]
    dead = page_data(features, [3], "t")["features"][0]
    assert set(dead) == {"i", "n", "u", "l"}, "a dead feature has no numbers and no examples"
    with pytest.raises(UnknownFeatureError, match="feature 4: the store has features 0 to 3"):
        write_page(features, [4], tmp_path / "page.html", "t")


@pytest.fixture
def opened(browser, make_features, tmp_path: Path):
    """The page in a browser, with everything it complained about or tried to load."""
    write(make_features, tmp_path)
    page = browser.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append("dialog"))
    page.on("request", lambda request: None if request.url.startswith("file:") else problems.append(request.url))
    page.goto(f"{(tmp_path / 'page.html').as_uri()}#0")
    yield page
    assert problems == []
    page.close()


def test_hostile_tokens_are_shown_as_text(opened) -> None:
    assert opened.locator("h2").inner_text() == "Feature 0"
    peak = opened.locator(".text .peak").first
    assert peak.inner_text().startswith("</script><img src=x onerror=document.body.remove()>")
    assert peak.get_attribute("title") == "2.38"
    assert opened.locator("img").count() == 0


def test_contexts_are_cut_and_coloured_as_stored(opened, make_features) -> None:
    feature = make_features("word")[0]
    shares = (
        opened.locator(".examples")
        .first.locator("li")
        .first.locator(".fires")
        .evaluate_all("nodes => nodes.map(node => Number(getComputedStyle(node).getPropertyValue('--share')))")
    )
    firing = [activation for activation in feature.top[0].activations if activation > 0]
    assert shares == [pytest.approx(0.12 + 0.88 * activation / feature.max, abs=2e-3) for activation in firing]


def test_a_long_run_of_spaces_stays_in_its_column(opened) -> None:
    beyond = opened.locator(".text").first.evaluate("""line => {
        line.querySelector(".fires").textContent = " ".repeat(600);
        const rectangles = [...line.querySelector(".fires").getClientRects()];
        return Math.max(...rectangles.map(one => one.right)) - line.getBoundingClientRect().right;
    }""")
    assert beyond <= 0.5


def expect(locator: Any) -> Any:
    """Waits for what is asserted of it, without the `eval` that the page's policy forbids."""
    return pytest.importorskip("playwright.sync_api").expect(locator)


def test_keys_and_addresses_choose_features(opened) -> None:
    opened.keyboard.press("j")
    expect(opened.locator("h2")).to_have_text("Feature 1")
    assert opened.url.endswith("#1")
    opened.keyboard.press("k")
    expect(opened.locator("h2")).to_have_text("Feature 0")
    opened.evaluate("location.hash = '2'")
    expect(opened.locator("h2")).to_have_text("Feature 2")
    assert "◌" in opened.locator(".text").first.inner_text()
    opened.evaluate("location.hash = '77'")
    expect(opened.locator(".empty")).to_have_text("Feature 77 is not on this page.")


def test_search_and_dead_features(opened) -> None:
    assert opened.locator("#list li").count() == 3
    opened.locator("#dead").check()
    assert opened.locator("#list li .number").all_text_contents() == ["0", "1", "2", "3"]
    opened.locator("#list a").last.click()
    expect(opened.locator("h2")).to_have_text("Feature 3")
    assert opened.locator(".badge").inner_text() == "dead"
    assert opened.locator(".examples").count() == 0
    opened.locator("#search").fill("ONERROR")
    assert "0" in opened.locator("#list li .number").all_text_contents()
    opened.locator("#search").fill("#1")
    assert opened.locator("#list li .number").all_text_contents() == ["1"]
    assert opened.locator("#found").inner_text() == "1 of 4 features"


def test_search_puts_the_token_itself_first(opened) -> None:
    """Features that hold the query within a longer token come after, whatever the order of the list."""
    tokens = [[" cannot", "!"], [" nothing"], ["is", " NOT"]]
    opened.evaluate(
        """tokens => data.features.slice(0, 3).forEach((feature, place) => {
        feature.p = tokens[place]; feature.u = ["a", 1]; feature.l = ["b", -1]; delete feature.tokens;
    })""",
        tokens,
    )
    found = opened.locator("#list li .number")
    opened.locator("#search").fill("not")
    assert found.all_text_contents() == ["2", "1", "0"], "the token, a token that begins so, one that holds it"
    opened.locator("#sort").select_option("i")
    assert found.all_text_contents() == ["2", "1", "0"]
    opened.locator("#search").fill(" not")
    assert found.all_text_contents() == ["2", "1"], "with the space it is another token"
    opened.evaluate("data.features[0].u = ['not', 1]; delete data.features[0].tokens; undefined")
    opened.locator("#search").fill("not")
    assert found.all_text_contents() == ["2", "0", "1"], "a token that is raised comes behind those fired on"
    opened.locator("#search").press("Enter")
    expect(opened.locator("h2")).to_have_text("Feature 2")


def test_search_says_why_and_knows_labels(browser, make_features, tmp_path: Path) -> None:
    features = make_features("word")
    (tmp_path / "labels.json").write_text(json.dumps({"1": "ends <b>of</b> lines"}))
    write_page(features, range(4), tmp_path / "page.html", "t")
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    found, why = page.locator("#list li .number"), page.locator("#list li .why")
    assert page.locator("#list .label").all_text_contents() == ["ends <b>of</b> lines"]
    page.locator("#search").fill("of</b> LINES")
    assert found.all_text_contents() == ["1"]
    page.locator("#search").fill("word")
    assert found.all_text_contents() == ["0"]
    examples = [example for group in (features[0].top, *features[0].quantiles) for example in group]
    on_word = [
        example
        for example in examples
        if any(value > 0 and token == "word" for token, value in zip(example.tokens, example.activations, strict=True))
    ]
    [hit] = features.search("word")
    expected = f"fires on 'word' in {len(on_word)} of {len(examples)} examples; promotes 'word'"
    assert why.all_text_contents() == [expected] == [hit.why]
    page.locator("#search").fill("")
    assert not any(why.all_text_contents())
    page.close()


def test_a_page_of_some_features_says_of_how_many(browser, make_features, tmp_path: Path) -> None:
    write_page(make_features(), [0, 1], tmp_path / "page.html", "t")
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    assert page.locator("#found").inner_text() == "2 of 2 features, on this page of 4"
    page.close()


def test_spaces_become_visible_when_asked(opened) -> None:
    assert "·" not in opened.locator(".text").first.inner_text()
    opened.locator("#space").check()
    assert "·" in opened.locator(".text").first.inner_text()


def test_page_data_is_small(make_features, tmp_path: Path) -> None:
    features = make_features("word")
    live = page_data(features, range(3), "t")["features"]
    examples = sum(len(entry["t"]) + sum(map(len, entry["q"])) for entry in live)
    assert len(embeddable_json(live)) / examples < 250, "32 examples a feature stay below 8 kB"


def test_fake_tokens_fit(make_features) -> None:
    assert len(make_features("word").vocabulary) == len(FakeTokenizer("word").names)
