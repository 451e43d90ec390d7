from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sae.errors import FormatError
from sae.model.vocabulary import _BYTE_OF, Vocabulary
from tests.support.feature_cache import FakeTokenizer


def hugging_face(backend: Tokenizer, special: tuple[int, ...] = ()) -> SimpleNamespace:
    """What of a Hugging Face tokenizer is used."""
    return SimpleNamespace(backend_tokenizer=backend, get_vocab=backend.get_vocab, all_special_ids=special)


def test_byte_alphabet_is_that_of_the_tokenizers_library() -> None:
    assert set(_BYTE_OF) == set(pre_tokenizers.ByteLevel.alphabet())
    for text in ("naïve café", "日本語", "\n\t \x00\x7f", "¡¬®ÿĀ"):
        pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
        assert bytes(_BYTE_OF[character] for piece, _ in pieces for character in piece).decode() == text


def test_byte_level_tokens_are_their_bytes() -> None:
    names = {"Ġthe": 0, "Ċ": 1, "Ã©": 2, "Ã": 3, "<|x|>": 4, "▁": 5}
    backend = Tokenizer(models.BPE(vocab=names, merges=[]))
    backend.decoder = decoders.ByteLevel()
    vocabulary = Vocabulary.of(hugging_face(backend, special=(4,)))
    assert vocabulary.tokens == (b" the", b"\n", "é".encode(), b"\xc3", b"<|x|>", "▁".encode())


def test_sentence_piece_tokens() -> None:
    names = {"▁the": 0, "ing": 1, "<0xE2>": 2, "▁▁": 3, "<s>": 4, "Ġ": 5}
    backend = Tokenizer(models.BPE(vocab=names, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    vocabulary = Vocabulary.of(hugging_face(backend, special=(4,)))
    assert vocabulary.tokens == (b" the", b"ing", b"\xe2", b"  ", b"<s>", "Ġ".encode())


def test_word_piece_tokens() -> None:
    backend = Tokenizer(models.WordPiece(vocab={"the": 0, "##ing": 1, "[CLS]": 2}, unk_token="[CLS]"))
    backend.decoder = decoders.WordPiece()
    assert Vocabulary.of(hugging_face(backend, special=(2,))).tokens == (b" the", b"ing", b"[CLS]")


def test_added_tokens_are_literal() -> None:
    tokenizer = FakeTokenizer()
    names = {**tokenizer.names, "été": 300}
    with_added = SimpleNamespace(
        get_vocab=lambda: names, all_special_ids=(0,), added_tokens_decoder={300: "été", 301: "<pad>"}
    )
    vocabulary = Vocabulary.of(with_added)
    assert (vocabulary.text(300), vocabulary.text(301), vocabulary.text(299)) == ("été", "<pad>", "")


def test_characters_spread_over_tokens_stand_with_the_last() -> None:
    vocabulary = Vocabulary.of(FakeTokenizer())
    tokens = [1 + byte for byte in "a€b".encode()]
    assert vocabulary.pieces(tokens) == ["a", "", "", "€", "b"]
    assert vocabulary.pieces(tokens, skip=2) == ["", "€", "b"]
    assert vocabulary.pieces(tokens[2:]) == ["", "", "b"], "a character whose beginning is missing"
    assert vocabulary.pieces(tokens[:3]) == ["a", "", ""], "a character whose end is missing"
    assert vocabulary.pieces([*tokens[:2], 0, *tokens[2:]]) == ["a", "", "<|end|>", "", "", "b"]


def test_tokens_of_several_characters_and_a_part() -> None:
    vocabulary = Vocabulary.of(FakeTokenizer("ab", "é€"))
    assert vocabulary.pieces([257, 258, 1 + 0xE2, 1 + 0x82, 1 + 0xAC]) == ["ab", "é€", "", "", "€"]


def test_a_part_of_a_character_alone_is_written_out() -> None:
    vocabulary = Vocabulary.of(FakeTokenizer())
    assert vocabulary.text(1 + 0xE2) == "\\xe2"
    assert vocabulary.text(999) == "<999>"


def test_json_round_trip() -> None:
    vocabulary = Vocabulary.of(FakeTokenizer("</script>", "\u2028", "é"))
    record = json.loads(json.dumps(vocabulary.to_json()))
    assert Vocabulary.from_json(record) == vocabulary
    assert record["text"][257] == "</script>"
    assert record["text"][1 + 0xC3] is None
    with pytest.raises(FormatError, match="vocabulary of the feature store: damaged"):
        Vocabulary.from_json({"text": [None], "bytes": {}, "special": []})
