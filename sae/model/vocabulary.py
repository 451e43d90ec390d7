"""The bytes of every token id, read once from the tokenizer, so that viewing features needs no tokenizer."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sae.errors import FormatError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SENTENCEPIECE_SPACE = "▁"
CONTEXT_BEFORE = 3
"""Tokens before a passage that may hold the first bytes of its first character: a character has at most four bytes."""


@dataclass(frozen=True)
class Vocabulary:
    """Bytes of every token, by id; empty for ids without a token.

    Attributes:
        tokens: the bytes of each token, which may be part of a character.
        special: ids of tokens that are not text (BOS, end of text, …); their bytes are their names.
    """

    tokens: tuple[bytes, ...]
    special: frozenset[int]

    def __len__(self) -> int:
        return len(self.tokens)

    @staticmethod
    def of(tokenizer: Any) -> Vocabulary:
        """Vocabulary of a Hugging Face tokenizer: byte-level BPE, SentencePiece or WordPiece."""
        names: dict[str, int] = tokenizer.get_vocab()
        special = frozenset(int(token) for token in tokenizer.all_special_ids)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        to_bytes = _reader(tokenizer, names)
        tokens = {token: name.encode() if token in special else to_bytes(name) for name, token in names.items()}
        tokens |= {int(token): str(entry).encode() for token, entry in added.items()}
        return Vocabulary(tuple(tokens.get(token, b"") for token in range(max(tokens, default=-1) + 1)), special)

    def text(self, token: int) -> str:
        """Text of a single token; bytes that are not a full character are written as \\xe2\\x82."""
        return self._bytes(token).decode(errors="backslashreplace")

    def pieces(self, tokens: Sequence[int], skip: int = 0) -> list[str]:
        """Text of each token in a sequence. The first `skip` tokens are left out: they only complete characters.

        A character that spans several tokens is given to the token that completes it, and the others are empty. Parts
        of a character that is never completed are left out.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        pieces = []
        for token in tokens:
            if token in self.special:
                decoder.reset()
                pieces.append(self.text(token))
            else:
                pieces.append(decoder.decode(self._bytes(token)))
        return pieces[skip:]

    def to_json(self) -> dict[str, Any]:
        """Bytes as text if they are valid text by themselves, else in hexadecimal."""
        texts = [_decoded(content) for content in self.tokens]
        parts = {str(token): self.tokens[token].hex() for token, text in enumerate(texts) if text is None}
        return {"text": texts, "bytes": parts, "special": sorted(self.special)}

    @staticmethod
    def from_json(record: dict[str, Any]) -> Vocabulary:
        """Inverse of `to_json`.

        Raises:
            FormatError: the record is not a vocabulary.
        """
        try:
            tokens = [
                bytes.fromhex(record["bytes"][str(token)]) if text is None else text.encode()
                for token, text in enumerate(record["text"])
            ]
            return Vocabulary(tuple(tokens), frozenset(record["special"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(
                f"vocabulary of the feature store: damaged ({error}); collect the features again"
            ) from error

    def _bytes(self, token: int) -> bytes:
        return self.tokens[token] if 0 <= token < len(self.tokens) else f"<{token}>".encode()


def _decoded(content: bytes) -> str | None:
    """The text; None if the bytes are not text by themselves."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def _reader(tokenizer: Any, names: dict[str, int]) -> Callable[[str], bytes]:
    """The function that turns this tokenizer's token names into bytes."""
    kinds = set(_component_types(tokenizer))
    if not kinds & {"ByteLevel", "WordPiece", "Metaspace", "ByteFallback"}:
        marks = {"Ġ": "ByteLevel", _SENTENCEPIECE_SPACE: "Metaspace", "##": "WordPiece"}
        kinds = {kind for mark, kind in marks.items() if any(name.startswith(mark) for name in names)}
    if "ByteLevel" in kinds:
        return _byte_level
    return _word_piece if "WordPiece" in kinds else _sentence_piece


def _component_types(tokenizer: Any) -> Iterator[str]:
    """Types of the decoder's parts, or of the pre-tokenizer's if there is no decoder."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    description = json.loads(backend.to_str())
    queue = [description.get("decoder") or description.get("pre_tokenizer")]
    while queue:
        part = queue.pop()
        if isinstance(part, dict):
            yield part.get("type", "")
            queue += [*part.get("decoders", []), *part.get("pretokenizers", [])]


_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + rank): byte for rank, byte in enumerate(_OTHERS)}
"""The byte of each character in byte-level BPE: printable bytes stand for themselves, others are above 255."""


def _byte_level(name: str) -> bytes:
    try:
        return bytes(_BYTE_OF[character] for character in name)
    except KeyError:
        return name.encode()


def _sentence_piece(name: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(name)
    return bytes([int(match[1], 16)]) if match else name.replace(_SENTENCEPIECE_SPACE, " ").encode()


def _word_piece(name: str) -> bytes:
    return (name[2:] if name.startswith("##") else f" {name}").encode()
