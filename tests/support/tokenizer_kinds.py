"""Small tokenizers of the kinds that language models have, learnt from a text."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _learnt(tokenizer: Any, trainer: Any, text: str) -> Any:
    tokenizer.train_from_iterator([text[start : start + 2000] for start in range(0, len(text), 2000)], trainer)
    return tokenizer


def _byte_level(text: str, split: str | None = None, normalizer: Any = None, **settings: Any) -> Any:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    byte_level = pre_tokenizers.ByteLevel(use_regex=split is None, **settings)
    cut = [] if split is None else [pre_tokenizers.Split(Regex(split), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cut, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _learnt(tokenizer, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False), text)


def _gpt2(text: str) -> Any:
    return _byte_level(text, add_prefix_space=False)


def _roberta(text: str) -> Any:
    return _byte_level(text, add_prefix_space=True, trim_offsets=True)


def _llama3(text: str) -> Any:
    return _byte_level(text, split=LLAMA_3, add_prefix_space=False)


def _qwen(text: str) -> Any:
    from tokenizers import normalizers

    return _byte_level(text, split=r"\p{N}|[^\p{N}]+", normalizer=normalizers.NFC(), add_prefix_space=False)


def _unigram(text: str, *, split: bool, prepend: str) -> Any:
    """With the pieces that would save most tokens: the library's own trainer finds others in every process."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])  # type: ignore[assignment]
    words = Counter(f"▁{word}" for word in normalizer.normalize_str(text).split(" "))
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for start in range(len(word)):
            for end in range(start + 1, min(start + 12, len(word)) + 1):
                counts[word[start:end]] += count
    by_gain = sorted(counts, key=lambda piece: (len(piece) > 1, -counts[piece] * (len(piece) - 1), piece))
    letters = sum(len(piece) == 1 for piece in counts)
    pieces = by_gain[: max(600, letters + 200)]
    total = sum(counts[piece] for piece in pieces)
    vocabulary = [("<unk>", 0.0), *((piece, math.log(counts[piece] / total)) for piece in pieces)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, 0, False))
    tokenizer.normalizer = normalizer  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=split)  # type: ignore[assignment]
    return tokenizer


def _t5(text: str) -> Any:
    return _unigram(text, split=True, prepend="always")


def _xlnet(text: str) -> Any:
    """Without words: the whole text is one."""
    return _unigram(text, split=False, prepend="first")


def _bert(text: str) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    trainer = trainers.WordPieceTrainer(vocab_size=900, show_progress=False, special_tokens=["[UNK]"])
    return _learnt(tokenizer, trainer, text)


def _llama2(text: str) -> Any:
    """SentencePiece's BPE: no pre-tokenizer, a space put before the text, unknown characters as bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")  # type: ignore[assignment]
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, show_progress=False, special_tokens=special, limit_alphabet=60)
    record = json.loads(_learnt(tokenizer, trainer, text).to_str())
    record["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    record["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    record["pre_tokenizer"] = None
    record["added_tokens"] = [token for token in record["added_tokens"] if token["content"] == "<unk>"]
    return Tokenizer.from_str(json.dumps(record))


KINDS: dict[str, Callable[[str], Any]] = {
    "gpt2": _gpt2, "roberta": _roberta, "llama3": _llama3, "qwen": _qwen, "t5": _t5, "xlnet": _xlnet, "bert": _bert,
    "llama2": _llama2,
}  # fmt: skip


def make(kind: str, text: str) -> Any:
    """A tokenizer of that kind, as transformers has them."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=KINDS[kind](text))
