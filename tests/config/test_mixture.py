"""Several sources of text: shares of tokens, names, sides of the held-out split, and what wrong requests are told."""

from __future__ import annotations

import json
import random
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from sae.config.file import load_config, parse_config
from sae.config.mixture import Turns, token_shares
from sae.config.sources import DataConfig
from sae.config.splits import HELD_OUT, SPLITS, TRAIN
from sae.errors import ConfigError, DataError
from sae.model.language_model import LanguageModel
from sae.numerics.seeding import python_random
from sae.text.corpus import is_held_out, read_documents
from sae.text.packing import Packer, packed_shards
from sae.text.prepared import prepared_documents

LENGTH = 16
Streams = dict[str, list[tuple[str, list[int]]]]


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 documents of a few words each, a tenth of what `text_folder`'s have."""
    path = tmp_path_factory.mktemp("notes") / "notes.jsonl"
    rng = random.Random(0)
    lines = [
        f"{number} {' '.join(rng.choices('def return self import for in x y z'.split(), k=rng.randint(1, 40)))}"
        for number in range(400)
    ]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    return path


def packed(config: DataConfig, model: LanguageModel) -> dict[str, tuple[list[int], list[str]]]:
    """By split: every row's token, and the name of its document."""
    rows = {TRAIN: config.tokens, HELD_OUT: config.held_out_tokens}
    packers = {s: Packer(rows[s], config.context_length, model.bos, model.separator) for s in SPLITS}
    shards: dict[str, list[Any]] = {split: [] for split in SPLITS}
    for split, shard in packed_shards(config, model.tokenizer, 4, packers):
        shards[split].append(shard)
    found = {}
    for split, packer in packers.items():
        names = packer.names
        documents = np.concatenate([shard.documents for shard in shards[split]]).tolist()
        tokens = np.concatenate([shard.tokens for shard in shards[split]]).tolist()
        found[split] = (tokens, [names[number] for number in documents])
    return found


def streams(config: DataConfig, number: int, model: LanguageModel) -> Streams:
    """What a source gives when it is alone, tokenised text by text; its place among the sources decides the shuffle."""
    alone = config.model_copy(update={"source": config.sources[number], "weights": None, "shuffle_documents": None})
    documents = list(prepared_documents(alone))
    if config.shuffle_documents:
        documents = shuffled_slowly(documents, config.shuffle_documents, number)
    found: Streams = {split: [] for split in SPLITS}
    for name, text, split in documents:
        found[split].append((name, model.tokenizer.encode(text, add_special_tokens=False)))
    return found


def shuffled_slowly(items: list[Any], size: int, number: int) -> list[Any]:
    """A buffer of `size` items, from which a random one leaves when another comes."""
    rng, buffer, left = python_random("order of documents", number), items[:size], []
    for item in items[size:]:
        place = rng.randrange(size)
        left.append(buffer.pop(place))
        buffer.insert(place, item)
    rng.shuffle(buffer)
    return left + buffer


def mix_slowly(
    sources: list[list[tuple[str, list[int]]]], labels: list[str], shares: list[float], rows: int, model: LanguageModel
) -> tuple[list[int], list[str]]:
    """One token at a time, always from the source that has given least for its share."""
    given, places = [0] * len(sources), [0] * len(sources)
    tokens, owners = [], []
    while len(tokens) < rows:
        turn = min(range(len(sources)), key=lambda number: given[number] / shares[number])
        name, ids = sources[turn][places[turn]]
        places[turn] += 1
        for token in (*ids, model.separator):
            for one in (model.bos, token) if len(tokens) % LENGTH == 0 else (token,):
                tokens.append(one)
                owners.append(f"{labels[turn]}/{name}")
                given[turn] += 1
    return tokens[:rows], owners[:rows]


@pytest.mark.parametrize(
    "options", [{}, {"section_characters": 150}, {"section_characters": 150, "shuffle_documents": 9}]
)
@pytest.mark.parametrize("at_once", [100, 5000, 10**6])
def test_a_mix_equals_the_slow_reference(
    options: dict[str, Any], at_once: int, notes: Path, text_folder: Path, language_model: LanguageModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """And how far sources are read ahead changes nothing."""
    monkeypatch.setattr("sae.text.prepared._CHARACTERS_AT_ONCE", at_once)
    config = DataConfig(
        source=(str(notes), str(text_folder)), weights=(3, 7), tokens=5001, held_out_tokens=1037,
        context_length=LENGTH, holdout_fraction=0.25, **options,
    )  # fmt: skip
    found = packed(config, language_model)
    alone = [streams(config, number, language_model) for number in range(2)]
    for split, rows in ((TRAIN, 5001), (HELD_OUT, 1037)):
        by_source = [stream[split] for stream in alone]
        assert found[split] == mix_slowly(by_source, ["notes.jsonl", "corpus"], [0.3, 0.7], rows, language_model)


@pytest.mark.parametrize("weights", [None, (0.7, 0.3), (1, 9)])
def test_shares_are_of_tokens_and_hold_over_every_stretch(
    weights: tuple[float, ...] | None, notes: Path, text_folder: Path, language_model: LanguageModel
) -> None:
    """From any row to any other the count is off by no more than one document; lengths of documents differ tenfold."""
    sources = (str(text_folder), str(notes)) if weights is None else (str(notes), str(text_folder))
    config = DataConfig(
        source=sources, weights=weights, tokens=4000, held_out_tokens=900, context_length=LENGTH, holdout_fraction=0.25
    )
    first, share = (Path(sources[0]).name, 0.5 if weights is None else weights[0] / sum(weights))
    for split, (_, owners) in packed(config, language_model).items():
        lengths = {name: owners.count(name) for name in set(owners)}
        longest = max(lengths.values())
        counts = np.cumsum([owner.startswith(f"{first}/") for owner in owners])
        off = np.concatenate([[0], counts - share * np.arange(1, len(owners) + 1)])
        assert off.max() - off.min() <= longest, (split, off.max(), off.min(), longest)
        assert counts[-1] / len(owners) == pytest.approx(share, abs=longest / len(owners))
        documents = [name for name in lengths if name.startswith(f"{first}/")]
        assert abs(len(documents) / len(lengths) - share) > 0.1, "documents are shared as tokens are: nothing is tested"


@pytest.mark.parametrize(
    "weights", [(1.0,), (7.0, 3.0), (1.0, 1.0, 1.0), (5.0, 2.0, 1.0, 1.0), (100.0, 10.0, 1.0, 1.0, 1.0, 30.0)]
)
def test_turns_keep_the_bounds_of_their_docstring(weights: tuple[float, ...]) -> None:
    rng = random.Random(len(weights))
    turns = Turns(token_shares(weights))
    shares = [Fraction(weight) / Fraction(sum(weights)) for weight in weights]
    lengths = [rng.choice([10, 100, 1000]) for _ in weights]
    total, ahead, behind = 0, Fraction(0), Fraction(0)
    for _ in range(3000):
        turn = turns.source
        tokens = rng.choice([0, 1, lengths[turn] // 2, lengths[turn]])
        turns.give(tokens)
        total += tokens
        assert sum(turns.given) == total
        for share, given, longest in zip(shares, turns.given, lengths, strict=True):
            off = given - share * total
            slack = Fraction(1, 10**6)  # shares are rounded to 12 digits
            assert off <= (1 - share) * longest + slack
            assert off >= -share * (sum(lengths) - longest) - slack
            ahead, behind = max(ahead, off / longest), min(behind, off / longest)
    if len(weights) > 1:
        assert ahead > 0.3
        assert behind < -0.03


def test_weights_are_proportions() -> None:
    assert token_shares((7.0, 3.0)) == token_shares((0.7, 0.3)) == token_shares((0.07, 0.03)) == (0.7, 0.3)
    assert sum(token_shares((1.0, 1.0, 1.0))) == pytest.approx(1, abs=1e-11)
    assert token_shares((1e308, 1e308)) == (0.5, 0.5)
    assert DataConfig(source=("a", "b", "c", "d")).shares == (0.25,) * 4


def sides(config: DataConfig) -> dict[str, str]:
    return {
        name: split for number in range(len(config.sources)) for name, _, split in prepared_documents(config, number)
    }


def test_names_and_sides_are_those_of_the_source_whatever_is_mixed(
    notes: Path, text_folder: Path, tmp_path: Path
) -> None:
    """Other weights, another order, another place on the disk, a third source."""
    third = tmp_path / "third.txt"
    third.write_text("A line of text.\n" * 5000, encoding="utf-8")
    moved = tmp_path / "elsewhere" / "corpus"
    moved.parent.mkdir()
    moved.symlink_to(text_folder)
    common = {"holdout_fraction": 0.3}
    mixed = sides(DataConfig(source=(str(notes), str(text_folder)), **common))
    assert mixed == sides(DataConfig(source=(str(moved), str(notes)), weights=(0.1, 0.9), **common))
    wider = sides(DataConfig(source=(str(third), str(notes), str(moved) + "/"), **common))
    assert mixed.items() < wider.items()
    assert {name.partition("/")[0] for name in wider} == {"notes.jsonl", "corpus", "third.txt"}
    expected = {}
    for source in (notes, text_folder):
        for document in read_documents(str(source)):
            side = HELD_OUT if is_held_out(document.name, 0, 0.3) else TRAIN
            expected[f"{source.name}/{document.name}"] = side
    assert mixed == expected
    assert set(mixed.values()) == set(SPLITS)
    assert "third.txt/third.txt#0" in wider


def test_documents_of_two_sources_never_share_a_name(tmp_path: Path, language_model: LanguageModel) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for number in range(20):
            (tmp_path / label / f"{number}.txt").write_text(f"{label} " * (40 + number), encoding="utf-8")
    config = DataConfig(
        source=(str(tmp_path / "a"), str(tmp_path / "b")), tokens=500, held_out_tokens=60, context_length=LENGTH,
        holdout_fraction=0.3,
    )  # fmt: skip
    for tokens, owners in packed(config, language_model).values():
        for label in ("a", "b"):
            letter = language_model.tokenizer.encode(f"{label} ")[0]
            own = {owner for token, owner in zip(tokens, owners, strict=True) if token == letter}
            assert own and all(owner.startswith(f"{label}/") for owner in own)


def running_out(config: DataConfig, model: LanguageModel) -> str:
    with pytest.raises(DataError) as caught:
        packed(config, model)
    return str(caught.value)


def test_a_source_that_runs_out_is_named_with_what_it_can_give(
    notes: Path, text_folder: Path, language_model: LanguageModel
) -> None:
    """The number of tokens that the message proposes works, and not one more."""
    config = DataConfig(
        source=(str(text_folder), str(notes)), weights=(0.2, 0.8), tokens=30_000, held_out_tokens=100,
        context_length=LENGTH, holdout_fraction=0.25,
    )  # fmt: skip
    message = running_out(config, language_model)
    text = sum(len(ids) + 1 for _, ids in streams(config, 1, language_model)[TRAIN])
    given = int(message.partition("documents hold ")[2].partition(" ")[0].replace(",", ""))
    assert text < given < text * 1.1  # with its part of the BOS tokens, one in 16
    assert message.startswith(
        f"data source {str(notes)!r}: the train documents hold {given:,} tokens, 0.8 of data.tokens=30,000 were asked"
    )
    possible = float(message.partition(": lower its weight in data.weights (to a share of ")[2].partition(")")[0])
    assert 0.98 * given / 30_000 < possible <= given / 30_000
    assert "), or lower data.tokens to " in message
    assert message.endswith(", or add text to this source")
    enough = int(message.partition("data.tokens to ")[2].partition(", or")[0].replace(",", ""))
    assert enough == pytest.approx(given / 0.8, abs=300)
    packed(config.model_copy(update={"tokens": enough}), language_model)
    running_out(config.model_copy(update={"tokens": enough + 1}), language_model)


def test_the_share_that_the_message_proposes_is_enough(
    notes: Path, text_folder: Path, language_model: LanguageModel
) -> None:
    config = DataConfig(
        source=(str(text_folder), str(notes)), weights=(0.8, 0.2), tokens=10_000, held_out_tokens=100,
        context_length=LENGTH, holdout_fraction=0.25, section_characters=50,
    )  # fmt: skip
    there = sum(len(ids) + 1 for _, ids in streams(config, 0, language_model)[TRAIN])
    config = config.model_copy(update={"tokens": there * 3 // 2})
    share = float(running_out(config, language_model).partition("to a share of ")[2].partition(")")[0])
    assert 2 / 3 < share < 0.8
    packed(config.model_copy(update={"weights": (share, 1 - share)}), language_model)
    assert "held-out documents hold" in running_out(
        config.model_copy(update={"tokens": 100, "held_out_tokens": 20_000}), language_model
    )


def test_a_source_without_text_or_without_held_out_documents(
    notes: Path, text_folder: Path, tmp_path: Path, language_model: LanguageModel
) -> None:
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"blank': the train documents hold 0 tokens, 0.5 of .*: the text is empty"):
        packed(DataConfig(source=(str(notes), str(tmp_path / "blank")), tokens=500), language_model)
    copy = shutil.copy(notes, tmp_path / "copy.jsonl")
    with pytest.raises(DataError, match=r"copy.jsonl': the train .*: its 400 documents equal those of another source"):
        packed(DataConfig(source=(str(notes), str(copy)), tokens=500), language_model)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").write_text("one document is on one side " * 300, encoding="utf-8")
    config = DataConfig(source=(str(notes), str(tmp_path / "one")), tokens=500, held_out_tokens=99, context_length=16)
    with pytest.raises(
        DataError, match=r"one': the held-out documents hold 0 tokens, .*: all of it is one document of one section"
    ):
        packed(config, language_model)


def test_a_source_inside_another_is_refused(text_folder: Path, notes: Path, tmp_path: Path, language_model) -> None:
    """Its documents would be there twice, under two names that may fall on two sides of the split."""
    link = tmp_path / "link"
    link.symlink_to(text_folder)
    for inner, outer in ((text_folder / "001.txt", text_folder), (text_folder, link)):
        with pytest.raises(DataError, match=rf"{inner.name}': it is '{outer}' or lies inside it, so its text would be"):
            packed(DataConfig(source=(str(inner), str(notes), str(outer))), language_model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": []}, "data.source=[]: name at least one source, such as stdlib"),
        ({"source": ["a", "b", "a/"]}, "data.source names 'a/' twice: name it once, and give it more of data.weights"),
        ({"source": ["x/t", "b", "y/t"]}, "data.source: 'x/t' and 'y/t' both end in 't', the prefix of their"),
        ({"source": ["stdlib", "x/stdlib"]}, "both end in 'stdlib'"),
        ({"source": ["a", 3]}, "setting data.source=['a', 3]: expected text, or a list of texts; put dates, "),
        ({"source": 3}, "setting data.source=3: expected text"),
        ({"source": None}, "setting data.source=None: expected text"),
        ({"source": "a", "weights": [1]}, "data.weights=[1.0] with one source, 'a': weights divide the tokens among"),
        ({"source": ["a"], "weights": [1]}, "data.weights=[1.0] with one source, 'a'"),
        ({"weights": []}, "data.weights=[] with one source, 'stdlib'"),
        ({"source": ["a", "b"], "weights": [1]}, "has 1 for the 2 sources of data.source=['a', 'b']: give each"),
        ({"source": ["a", "b"], "weights": []}, "data.weights=[] has 0 for the 2"),
        ({"source": ["a", "b"], "weights": [1, 0]}, "data.weights=[1.0, 0.0]: expected positive numbers"),
        ({"source": ["a", "b"], "weights": [1, -1]}, "to leave a source out, remove it from data.source"),
        ({"source": ["a", "b"], "weights": [1, float("nan")]}, "expected positive numbers"),
        ({"source": ["a", "b"], "weights": [1, float("inf")]}, "expected positive numbers"),
        ({"source": ["a", "b"], "weights": [1e300, 1]}, "the least no less than a billionth of their sum"),
        ({"source": ["a", "b"], "weights": [1, "x"]}, "setting data.weights.1='x': input should be a valid number"),
        ({"source": ["a", "b"], "weights": 1}, "data.weights=[1.0] has 1 for the 2 sources of data.source=['a', 'b']"),
    ],
)  # fmt: skip
def test_wrong_mixes_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"data": settings})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises((ConfigError, ValidationError)):
        DataConfig(**settings)


def test_a_list_of_sources_on_the_command_line() -> None:
    config = load_config(None, ["data.source=[a, path/to/b]", "data.weights=[0.7,0.3]"])
    assert (config.data.source, config.data.weights) == (("a", "path/to/b"), (0.7, 0.3))
    assert config.data.sources == ("a", "path/to/b")
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config
    assert load_config(None, ["data.source=[2024]", "data.source=['2024']"]).data.source == "2024"
    for text in ("2024-11-23", "001", "a, b", "1e5", "{a: b}", "null", "'a'", "- a"):
        config = load_config(None, [f"data.source={text}"])
        assert (config.data.source, config.data.sources) == (text, (text,))


def test_a_list_of_one_is_that_one(tmp_path: Path) -> None:
    assert load_config(None, ["data.source=[stdlib]"]) == load_config(None, [])
    (tmp_path / "c.yaml").write_text("data:\n  source:\n  - a\n")
    assert load_config(tmp_path / "c.yaml").data.source == "a"


def test_a_path_that_begins_with_a_bracket_needs_quotes(tmp_path: Path) -> None:
    assert load_config(None, ['data.source=["[old] texts"]']).data.source == "[old] texts"
    assert load_config(None, ["data.source=['[old] texts', b]"]).data.sources == ("[old] texts", "b")
    assert load_config(None, ["data.source=./[old] texts"]).data.source == "./[old] texts"
    (tmp_path / "c.yaml").write_text("data: {source: '[old] texts'}\n")
    assert load_config(tmp_path / "c.yaml").data.source == "[old] texts"
    with pytest.raises(
        ConfigError, match=r"is not a YAML value; text that itself begins with '\[' goes in quotes into a list"
    ):
        load_config(None, ["data.source=[old] texts"])
    assert load_config(None, ["out=[a, b]"]).out == "[a, b]"
