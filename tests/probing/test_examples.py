"""From labelled texts to rows of activations: which tokens, how many of each class, and the numbers at them."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sae
from sae.dictionary.token_policy import TokenPolicy
from sae.errors import DamagedError, DataError
from sae.files import sums
from sae.files.writing import write_json
from sae.model.language_model import LanguageModel
from sae.probing.activations import load_activations, read_activations, save_activations
from sae.probing.data import LabelledTexts
from sae.probing.examples import Examples, choose_examples
from sae.probing.first_letters import letter_examples, vocabulary_words
from sae.probing.settings import LetterConfig, ProbeConfig

HOOK = "blocks.1.hook_resid_pre"
WORDS = "river stone house letter winter garden engine mother number silver road window question".split()


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) + f" {number}" for number in range(count)]


def policy_of(model: LanguageModel, masked_positions: int = 1) -> TokenPolicy:
    return model.token_policy(prepend_bos=True, masked_positions=masked_positions, mask_special_tokens=True)


def choose(model: LanguageModel, data: LabelledTexts, policy: TokenPolicy | None = None, **settings) -> Examples:
    return choose_examples(data, model.tokenizer, policy or policy_of(model), model.bos, ProbeConfig(**settings))


def test_the_last_token_that_counts_stands_for_a_text(language_model: LanguageModel) -> None:
    data = LabelledTexts("set", tuple(texts(30)), ("a", "b") * 15)
    found = choose(language_model, data)
    for text, context, position in zip(data.texts, found.contexts, found.position, strict=True):
        assert list(context) == [language_model.bos, *language_model.tokenizer(text)["input_ids"]]
        assert position == len(context) - 1
    assert found.labels == data.labels
    ended = LabelledTexts("set", tuple(f"{text}<|endoftext|>" for text in texts(30)), ("a", "b") * 15)
    for context, position in zip(
        *[getattr(choose(language_model, ended), n) for n in ("contexts", "position")], strict=True
    ):
        assert context[-1] == language_model.bos
        assert position == len(context) - 2


def test_long_texts_keep_their_end(language_model: LanguageModel) -> None:
    data = LabelledTexts("set", tuple(texts(30)), ("a", "b") * 15)
    for text, context in zip(data.texts, choose(language_model, data, max_tokens=6).contexts, strict=True):
        assert context == (language_model.bos, *language_model.tokenizer(text)["input_ids"][-5:])


def test_as_many_of_each_class_as_possible_drawn_by_seed(language_model: LanguageModel) -> None:
    data = LabelledTexts("set", tuple(texts(120)), ("a",) * 90 + ("b",) * 30)
    assert Counter(choose(language_model, data, examples=40).labels) == {"a": 20, "b": 20}
    assert Counter(choose(language_model, data, examples=100).labels) == {"a": 50, "b": 30}
    first, other = (choose(language_model, data, examples=40, seed=seed) for seed in (0, 1))
    assert first == choose(language_model, data, examples=40)
    assert first.contexts != other.contexts


def test_equal_texts_are_one_group(language_model: LanguageModel) -> None:
    some = texts(20)
    found = choose(language_model, LabelledTexts("set", (*some, *some), ("a", "b") * 20))
    assert found.groups == (*range(20), *range(20))


def test_texts_that_differ_in_space_around_them_are_one_group(language_model: LanguageModel) -> None:
    some = texts(20)
    around = ("", "\n", " ", "\r\n", "\t", "\ufeff")
    copies = [f"{text}{space}" if space != "\ufeff" else f"{space}{text}" for text in some for space in around]
    found = choose(language_model, LabelledTexts("set", tuple(copies), ("a",) * 60 + ("b",) * 60))
    assert found.groups == tuple(number for number in range(20) for _ in around)
    assert found.equal == 100
    lines = [f"one line\n{text}" for text in some]
    data = LabelledTexts("set", (*lines, *(line.replace("\n", "\r\n") for line in lines)), ("a", "b") * 20)
    assert choose(language_model, data).groups == (*range(20), *range(20))
    spans = tuple(((0, 5, "a"), (5, len(text), "b")) for text in copies)
    of_spans = choose(language_model, LabelledTexts("set", tuple(copies), spans=spans), examples=10_000)
    assert len(set(of_spans.groups)) == 20
    assert of_spans.equal == 100


def test_equal_by_way_of_a_third_text(language_model: LanguageModel) -> None:
    """The first two have equal contexts; the third equals the second but for a line end."""
    end = " ".join(WORDS)
    linked = (f"a {end}", f"b {end}", f"b {end}\n", f"c {end} ")
    data = LabelledTexts("set", (*linked, *texts(26)), ("a", "b") * 15)
    found = choose(language_model, data, max_tokens=6)
    assert found.groups[:3] == (0, 0, 0)
    assert found.groups[3] != 0
    assert found.equal == 2


def test_texts_of_masked_tokens_alone_are_left_out(language_model: LanguageModel) -> None:
    data = LabelledTexts("set", ("x", *texts(30)), ("a", *("a", "b") * 15))
    found = choose(language_model, data, policy_of(language_model, masked_positions=2))
    assert found.left_out == 1
    assert len(found.labels) == 30
    short = LabelledTexts("set", ("x", "y") * 20, ("a", "b") * 20)
    with pytest.raises(DataError, match="data 'set': every token is masked by the token policy; give longer texts"):
        choose(language_model, short, policy_of(language_model, masked_positions=2))


def test_tokens_of_spans(language_model: LanguageModel) -> None:
    """Every token of a span is an example with its label; what is outside is left out, or has a label of its own."""
    sentences = [f"{first} and {second} opens the road" for first in WORDS for second in WORDS]
    spans = tuple(
        ((0, len(text.split()[0]), "first"), (text.index(" and ") + 5, text.index(" opens"), "second"))
        for text in sentences
    )
    data = LabelledTexts("set", tuple(sentences), spans=spans)
    found = choose(language_model, data, examples=10_000)
    assert set(found.labels) == {"first", "second"}
    by_label = {"first": set(), "second": set()}
    for context, position, label in zip(found.context, found.position, found.labels, strict=True):
        by_label[label].add(language_model.tokenizer.decode([found.contexts[context][position]]).strip())
    joined = {label: "".join(sorted("".join(pieces))) for label, pieces in by_label.items()}
    letters = "".join(WORDS)
    assert all(set(text) <= set(letters) for text in joined.values())
    assert {"and", "opens"}.isdisjoint(by_label["first"] | by_label["second"])
    assert len(found.groups) > len(set(found.groups)) > 100
    outside = choose(language_model, data, examples=300, outside="none")
    assert Counter(outside.labels) == {"first": 100, "second": 100, "none": 100}
    tail = len(language_model.tokenizer(" opens the road")["input_ids"])
    truncated = choose(language_model, data, examples=10_000, max_tokens=tail + 3, outside="none")
    assert set(truncated.labels) == {"second", "none"}
    for context, position, label in zip(truncated.context, truncated.position, truncated.labels, strict=True):
        if position >= len(truncated.contexts[context]) - tail:
            assert label == "none"


def test_a_span_without_label_is_neither_an_example_nor_outside(language_model: LanguageModel) -> None:
    sentences = tuple(f"{first} {second} road" for first in WORDS for second in WORDS)
    spans = tuple(
        ((0, len(text.split()[0]), "first"), (len(text.split()[0]), len(text) - 5, None)) for text in sentences
    )
    found = choose(language_model, LabelledTexts("set", sentences, spans=spans), examples=10_000, outside="none")
    outside = {
        language_model.tokenizer.decode([found.contexts[context][position]]).strip()
        for context, position, label in zip(found.context, found.position, found.labels, strict=True)
        if label == "none"
    }
    assert set("".join(outside)) == set("road")


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_activations_are_those_of_each_text_read_alone(language_model: LanguageModel, pool: str) -> None:
    data = LabelledTexts("set", tuple(texts(40)), ("a", "b") * 20)
    policy = policy_of(language_model)
    found = choose(language_model, data, policy, pool=pool)
    steps: list[tuple[int, int]] = []
    read = read_activations(language_model, HOOK, found, lambda done, total: steps.append((done, total)))
    assert steps[-1][0] == steps[-1][1] == sum(map(len, found.contexts))
    dictionary = sae.TopK(32, 64, k=4)
    torch.nn.init.normal_(dictionary.W_enc, generator=torch.Generator().manual_seed(0))
    for number, context in enumerate(found.contexts):
        tokens = torch.tensor([context])
        rows = language_model.activations(tokens, [HOOK])[HOOK][0][policy.eligible(tokens)[0]]
        rows = rows[-1:] if pool == "last" else rows
        assert torch.allclose(read.dense()[number], rows.mean(0), rtol=1e-4, atol=1e-5)
        assert torch.allclose(read.latents(dictionary)[number], dictionary.encode(rows).mean(0), rtol=1e-3, atol=1e-4)


def test_activations_are_kept_in_files(language_model: LanguageModel, tmp_path: Path) -> None:
    found = choose(language_model, LabelledTexts("set", tuple(texts(30)), ("a", "b") * 15), pool="mean")
    read = replace(read_activations(language_model, HOOK, found), left_out=3, equal=2)
    name, key = "131_Typical Time", "abc" * 20
    save_activations(read, tmp_path, name, key)
    again = load_activations(tmp_path, name, key)
    assert again is not None
    assert (again.labels, again.left_out, again.equal) == (read.labels, 3, 2)
    for part in ("rows", "example", "groups"):
        assert torch.equal(getattr(again, part), getattr(read, part))
    (tmp_path / "131_Typical_Time-abcabcabcabcabca.safetensors").write_bytes(b"damaged")
    with pytest.raises(DamagedError, match=r"Time-abcabcabcabcabca.safetensors': damaged or changed"):
        load_activations(tmp_path, name, key)
    assert load_activations(tmp_path, "missing", key) is None


def test_activations_are_known_by_their_whole_key(language_model: LanguageModel, tmp_path: Path) -> None:
    """Not by the name of a file, which a dot in the data set's name or another key of equal beginning could share."""
    found = choose(language_model, LabelledTexts("set", tuple(texts(30)), ("a", "b") * 15))
    read = read_activations(language_model, HOOK, found)
    for name in ("r.v1", "r.v2", "x\ny", "\udcff", "n" * 235, "字" * 100, ""):
        for key in ("1" * 64, "2" * 64):
            save_activations(replace(read, left_out=int(key[0])), tmp_path, name, key)
        for key in ("1" * 64, "2" * 64):
            held = load_activations(tmp_path, name, key)
            assert held is not None
            assert held.left_out == int(key[0])
        assert load_activations(tmp_path, name, "1" * 16 + "3" * 48) is None
    sums.read_sums(tmp_path)
    for file in tmp_path.glob("*.json"):
        write_json(file, {part: value for part, value in json.loads(file.read_text()).items() if part != "key"})
    with pytest.warns(UserWarning, match="activations saved by an earlier version do not say what they are from; they"):
        assert load_activations(tmp_path, "r.v1", "1" * 64) is None


def test_words_and_their_first_letters() -> None:
    model = LanguageModel(sae.ModelConfig(name="demo"))
    words = vocabulary_words(model.tokenizer)
    for token, word in words.items():
        text = model.tokenizer.decode([token])
        assert text[0] == " "
        assert text[1:].lower() == word
        assert word.isalpha() and word.isascii() and len(word) >= 3
    everything = [model.tokenizer.decode([token]) for token in range(len(model.tokenizer))]
    expected = [text for text in everything if text[:1] == " " and text[1:].isalpha() and text.isascii()]
    assert len(words) == sum(len(text) > 3 for text in expected) > 300
    settings = LetterConfig(words=30, prompt="import os\n")
    found = letter_examples(model.tokenizer, policy_of(model), model.bos, settings)
    counts = Counter(word[0] for word in words.values())
    assert Counter(found.labels) == {letter: min(count, 30) for letter, count in counts.items() if count >= 20}
    opening = [model.bos, *model.tokenizer("import os\n")["input_ids"]]
    for context, position, label in zip(found.contexts, found.position, found.labels, strict=True):
        assert list(context[:-1]) == opening
        assert position == len(opening)
        assert words[context[-1]][0] == label
    with pytest.raises(DataError, match=r"the word is at position 1, and the first 2 are masked; give a longer prompt"):
        letter_examples(model.tokenizer, policy_of(model, 2), model.bos, LetterConfig(prompt=""))


def test_a_vocabulary_without_words(language_model: LanguageModel) -> None:
    with pytest.raises(DataError, match=r"first letters: the vocabulary has .* 2 letters are needed"):
        letter_examples(language_model.tokenizer, policy_of(language_model), language_model.bos, LetterConfig())
