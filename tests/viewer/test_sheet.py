"""The page of a concept: its numbers, hostile text as text, and nothing from elsewhere."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sae.probing import ConceptConfig, ConceptSearch
from sae.probing.activations import LabelledActivations, RowTexts
from sae.probing.concept_view import concept_sheet, concept_table, neuron_name, p_text, rows, sentences
from sae.probing.concepts import find_in_examples
from sae.viewer import write_sheet
from tests.viewer.conftest import EVIL


class Positive:
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(min=0)


def found(shift: float = 3.0) -> ConceptSearch:
    count = 80
    x = torch.randn(count, 12, generator=torch.Generator().manual_seed(0)) - 1.0
    x[::2, 7] += shift
    labels = tuple("with" if number % 2 == 0 else "without" for number in range(count))
    texts = RowTexts(tuple((EVIL, f" {number}\n") for number in range(count)), tuple(range(count)), (1,) * count)
    data = LabelledActivations(x, torch.arange(count), labels, torch.arange(count), texts=texts)
    settings = ConceptConfig(positive="with", permutations=99, listed=4)
    return replace(find_in_examples(Positive(), data, settings, EVIL), subject={"hook": "h", "model": {"name": EVIL}})


@pytest.fixture
def opened(browser, tmp_path: Path):
    write_sheet(concept_sheet(found()), tmp_path / "page.html")
    page = browser.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith("file:") else problems.append(request.url))
    page.goto((tmp_path / "page.html").as_uri())
    yield page
    assert problems == []
    page.close()


def test_the_page_shows_numbers_and_examples(opened) -> None:
    result = found()
    assert result.best.index == 7
    cells = [row.split("\t") for row in opened.locator("tbody").inner_text().splitlines()]
    assert [cell[0] for cell in cells[:4]] == [f"feature {feature.index}" for feature in result.features]
    assert cells[0][1] == f"{result.best.auc.value:.3f} ± {result.best.auc.standard_error:.3f}"
    assert cells[4][0] == neuron_name(result.neuron)
    assert opened.locator("circle").count() == 5
    first = opened.locator(".examples").first
    assert first.locator("li").count() == len(result.best.examples) == 8
    assert first.locator(".fires.peak").first.inner_text().strip().startswith(result.best.examples[0].tokens[1].strip())
    assert first.locator(".value").first.inner_text() == f"{result.best.examples[0].value:.3g}"
    assert "</script><img src=x" in first.locator(".text").first.inner_text()
    colour = first.locator(".fires.peak").first.evaluate("node => getComputedStyle(node).getPropertyValue('--share')")
    assert float(colour) == 1


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    write_sheet(concept_sheet(found()), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<img" not in page and "<script" not in page and "\x1b" not in page
    assert "default-src 'none'; style-src 'sha256-" in page
    assert not re.search(r"https?:|src=|href=| style=", page.replace("img src=x", ""))


def test_sentences_say_whether_a_feature_stands_out() -> None:
    result = found()
    assert sentences(result)[0].startswith("Feature 7 stands out: at most 0.01 of the searches with shuffled labels")
    nothing = found(shift=0.0)
    assert nothing.best.p > 0.05
    assert sentences(nothing)[0].startswith(f"No feature stands out: {nothing.best.p:.2g} of the searches")
    assert p_text(0.01, result) == "at most 0.01" and p_text(0.02, result) == "0.02"


def test_the_table_has_a_row_for_each_and_the_nulls() -> None:
    result = found()
    table = rows(result)
    assert [row[0] for row in table[-2:]] == ["features, shuffled", "neurons, shuffled"]
    assert table[-2][1] == f"{result.null.auc:.3f} ± {result.null.deviation:.3f}"
    console = Console(width=80, file=io.StringIO())
    console.print(concept_table(result, 80))
    assert f"feature {result.best.index}" in console.file.getvalue()
