from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from sae.errors import ConfigError
from sae.viewer import print_feature, print_features
from sae.viewer.terminal import density_text, number_text, quantile_title, visible


def printed(function: Any, *arguments: Any, colour: bool = False, **settings: Any) -> str:
    stream = io.StringIO()
    function(
        *arguments,
        Console(file=stream, width=160, force_terminal=colour, color_system="truecolor" if colour else None),
        **settings,
    )
    return stream.getvalue()


def test_a_feature_shows_its_numbers_contexts_and_quantiles(make_features) -> None:
    text = printed(print_feature, make_features("word")[0])
    assert text.startswith("Feature 0  density")
    assert "max 2.38" in text
    assert "firings 24" in text
    assert "raises  word +1.00" in text
    assert "lowers" in text
    assert "Strongest, one per document" in text
    assert "Random from the 50–100 % quantile of non-zero activations" in text
    assert "Random from the 0–50 % quantile of non-zero activations" in text
    assert "2.38 é→z<|end|>a«word»↵‹b› é" in text.splitlines()


def test_tokens_are_never_markup_nor_control_sequences(make_features) -> None:
    text = printed(print_feature, make_features()[0])
    assert "[bold]" in text
    assert "\x1b" not in text
    assert "�[31m" in text


def test_intensity_follows_the_activation(make_features) -> None:
    text = printed(print_feature, make_features("word")[0], colour=True)
    assert "\x1b[1;4;37;48;2;214;102;16mword\x1b[0m" in text, "the strongest activation has the full colour"
    assert "48;2;87;54;30mb\x1b[0m" in text, "0.25 / 2.375 of the way from pale to hot"


def test_firing_on_a_part_of_a_character_is_visible(make_features) -> None:
    feature = make_features("word")[2]
    assert feature.top[0].tokens[feature.top[0].position] == ""
    assert "«◌»é" in printed(print_feature, feature)


def test_dead_features_are_labelled_and_have_no_contexts(make_features) -> None:
    text = printed(print_feature, make_features("word")[3])
    assert text.startswith("Feature 3  dead")
    assert "never fired" in text
    assert "Strongest" not in text


def test_the_table_puts_dead_features_last(make_features) -> None:
    features = make_features("word")
    lines = printed(print_features, features).splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == ["0", "1", "2", "3"]
    assert lines[2].split()[-1] == "«word»"
    assert lines[5].split() == ["3", "dead"]
    assert lines[-1].startswith("4 of 4 features by density; 1 dead in")
    assert len(printed(print_features, features, sort="max", limit=2).splitlines()) == 5
    with pytest.raises(ConfigError, match="column 'size': features are sorted by density"):
        printed(print_features, features, sort="size")


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("colour", [False, True])
def test_numbers_are_whole_at_every_width_and_text_gives_way(make_features, width: int, colour: bool) -> None:
    features = make_features("a word that is far longer than any line of a terminal ")
    stream = io.StringIO()
    system = "truecolor" if colour else None
    print_features(features, Console(file=stream, width=width, force_terminal=colour, color_system=system))
    text = re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue())
    lines = text.splitlines()
    assert lines[0].split()[:4] == ["feature", "density", "max", "mean"]
    for line, index in zip(lines[2:5], (0, 1, 2), strict=True):
        one = features[index]
        numbers = [str(index), *density_text(one.density).split(), number_text(one.max), number_text(one.mean)]
        assert line.split()[:5] == numbers
        assert len(line) <= width
    assert ("«a word" in text) != colour, "where no colour marks the token that fires, signs do"
    assert ("…" in text) == (width < 200)


def test_the_table_counts_all_features_of_the_dictionary(make_features) -> None:
    features = make_features("word")
    rare = features[2].density
    text = printed(print_features, features, max_density=rare).splitlines()[-1]
    kept = sum(features[index].density <= rare for index in range(4))
    limit = density_text(rare)
    assert text.startswith(f"{kept} of 4 features by density, {kept} of them on at most {limit} of tokens;")


def test_texts() -> None:
    assert visible("a\nb\tc\r") == "a↵b→c␍"
    assert visible("\x1b[2J\u202e") == "�[2J�"
    assert quantile_title(0, 4).startswith("Random from the 75–100 %")
    assert (density_text(0.25), density_text(0.00123), density_text(0.05)) == ("25 %", "0.12 %", "5 %")
    assert (number_text(5.6), number_text(123.4), number_text(12345.0), number_text(1e-5)) == (
        "5.60",
        "123",
        "1.23e+04",
        "1e-05",
    )
