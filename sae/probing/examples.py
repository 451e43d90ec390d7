"""Turn labelled texts into contexts of tokens, and choose the positions that are examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sae.dictionary.token_policy import TokenPolicy
from sae.errors import DataError
from sae.numerics.seeding import numpy_generator
from sae.probing.data import LabelledTexts, Span
from sae.probing.settings import ProbeConfig
from sae.text.digests import normalised_digest
from sae.text.endings import last_tokens

LEAST_OF_A_CLASS = 12
MOST_CLASSES = 64


@dataclass(frozen=True)
class Examples:
    """Contexts of tokens, and the rows to read from them.

    Attributes:
        contexts: tokens of each text, BOS included.
        context: the context of each row.
        position: the position of each row in its context.
        example: the example each row belongs to: one row each, or all rows of a text if they are averaged.
        labels: label of each example.
        groups: group of each example. Dependent examples share a group: those of the same text, of texts that are equal
            except for line ends and surrounding whitespace, or of equal contexts.
        left_out: number of texts and spans without a label, and of drawn texts without a token that counts.
        equal: number of the examples' texts that are in the group of an earlier one.
    """

    contexts: tuple[tuple[int, ...], ...]
    context: tuple[int, ...]
    position: tuple[int, ...]
    example: tuple[int, ...]
    labels: tuple[str, ...]
    groups: tuple[int, ...]
    left_out: int
    equal: int = 0


def choose_examples(
    data: LabelledTexts, tokenizer: Any, policy: TokenPolicy, bos: int | None, settings: ProbeConfig
) -> Examples:
    """Draw examples by seed, balanced over classes if possible, and find their tokens.

    Tokens that the policy masks (BOS, first positions, special tokens) are not examples. A text is represented by its
    last token that counts, or by all tokens that count.

    Args:
        data: texts with labels, or with labelled spans. With spans, each token whose first non-space character lies in
            a span is an example.
        tokenizer: the language model's tokenizer; spans require one with offsets.
        policy: which tokens count.
        bos: opens each context if the policy says so.
        settings: number of examples and their length.

    Raises:
        DataError: there are too many classes, fewer than two, or too few examples of them.
    """
    if data.spans:
        return _tokens_of_spans(data, tokenizer, policy, bos, settings)
    check_classes(data.name, data.labels)
    chosen = _balanced(data.labels, settings)
    texts = [data.texts[number] for number in chosen]
    begin = opening(policy, bos)
    contexts = [
        (*begin, *places[:, 2].tolist()) for places in last_tokens(tokenizer, texts, settings.max_tokens - len(begin))
    ]
    rows: list[tuple[int, int, int]] = []
    sources: list[int] = []
    for number, context in enumerate(contexts):
        positions = _eligible(context, policy)
        if not positions:
            continue
        rows += [
            (number, position, len(sources)) for position in (positions[-1:] if settings.pool == "last" else positions)
        ]
        sources.append(number)
    return _examples(
        data.name, contexts, texts, rows, [data.labels[chosen[number]] for number in sources], sources,
        data.left_out + len(contexts) - len(sources),
    )  # fmt: skip


def check_classes(name: str, labels: Sequence[str]) -> None:
    """Raise DataError if the labels are not classes that probes can tell apart."""
    counts = Counter(labels)
    if len(counts) > MOST_CLASSES:
        raise DataError(
            f"data {name!r}: {len(counts):,} different labels, such as {min(counts)!r}: probes tell at most "
            f"{MOST_CLASSES} classes apart; choose another column with label=COLUMN, or put numbers into ranges"
        )
    if len(counts) < 2:
        raise DataError(f"data {name!r}: all labels are {next(iter(counts), None)!r}; at least two classes are needed")
    enough = sum(count >= LEAST_OF_A_CLASS for count in counts.values())
    if enough < 1 or (enough < 2 and len(counts) == 2):
        label, count = min(counts.items(), key=lambda item: item[1])
        raise DataError(
            f"data {name!r}: {count} example{'' if count == 1 else 's'} of {label!r}, at least {LEAST_OF_A_CLASS} are "
            "needed; add some"
        )


def _tokens_of_spans(
    data: LabelledTexts, tokenizer: Any, policy: TokenPolicy, bos: int | None, settings: ProbeConfig
) -> Examples:
    """Draw from all labelled tokens; only the texts of the drawn tokens are read by the model."""
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"data {data.name!r}: spans need a fast tokenizer, which gives the positions of its tokens")
    begin = opening(policy, bos)
    contexts: list[tuple[int, ...]] = []
    candidates: list[tuple[int, int]] = []
    labels: list[str] = []
    for number, places in enumerate(last_tokens(tokenizer, data.texts, settings.max_tokens - len(begin))):
        contexts.append((*begin, *places[:, 2].tolist()))
        for position in _eligible(contexts[-1], policy):
            if position < len(begin):
                continue
            start, end = places[position - len(begin), :2].tolist()
            label = _label_of(data.texts[number], start, end, data.spans[number], settings.outside)
            if label is not None:
                candidates.append((number, position))
                labels.append(label)
    check_classes(data.name, labels)
    chosen = _balanced(labels, settings)
    read = sorted({candidates[number][0] for number in chosen})
    place = {text: number for number, text in enumerate(read)}
    rows = [(place[candidates[number][0]], candidates[number][1], row) for row, number in enumerate(chosen)]
    return _examples(
        data.name, [contexts[text] for text in read], [data.texts[text] for text in read], rows,
        [labels[number] for number in chosen], [row[0] for row in rows], data.left_out,
    )  # fmt: skip


def _label_of(
    text: str, start: int, end: int, spans: Sequence[Span], outside: str | None
) -> str | None:  # fmt: skip
    """Label of the span that has the token's first non-space character; None if that span's label is missing."""
    start += len(text[start:end]) - len(text[start:end].lstrip())
    covering = [label for first, after, label in spans if first <= start < min(after, end)]
    return next((label for label in covering if label is not None), None if covering else outside)


def _balanced(labels: Sequence[str], settings: ProbeConfig) -> list[int]:
    """Numbers of the drawn examples, in ascending order."""
    classes = sorted(set(labels))
    class_size = max(1, settings.examples // len(classes))
    rng = numpy_generator("probes: examples", settings.seed)
    array = np.array(labels)
    drawn = [rng.permutation(np.flatnonzero(array == name))[:class_size] for name in classes]
    return sorted(int(number) for numbers in drawn for number in numbers)


def numbered(values: Iterable[Hashable]) -> tuple[int, ...]:
    """Numbers from 0 on in place of values, in the order of their first appearance; equal values share one."""
    numbers: dict[Hashable, int] = {}
    return tuple(numbers.setdefault(value, len(numbers)) for value in values)


def opening(policy: TokenPolicy, bos: int | None) -> tuple[int, ...]:
    """The tokens before a text's last tokens: BOS if contexts have one."""
    return (bos,) if policy.prepend_bos and bos is not None else ()


def _eligible(context: tuple[int, ...], policy: TokenPolicy) -> list[int]:
    if not context:
        return []
    return policy.eligible(torch.tensor([context]))[0].nonzero().flatten().tolist()


def _examples(
    name: str, contexts: Sequence[tuple[int, ...]], texts: Sequence[str], rows: list[tuple[int, int, int]],
    labels: list[str], context_of: list[int], left_out: int,
) -> Examples:  # fmt: skip
    if not labels:
        raise DataError(f"data {name!r}: every token is masked by the token policy; give longer texts")
    check_classes(name, labels)
    text_groups = _dependent(contexts, texts)
    groups = numbered(text_groups[number] for number in context_of)
    return Examples(
        tuple(contexts), *(tuple(row[part] for row in rows) for part in range(3)),
        labels=tuple(labels), groups=groups, left_out=left_out, equal=len(set(context_of)) - len(set(groups)),
    )  # fmt: skip


def _dependent(contexts: Sequence[tuple[int, ...]], texts: Sequence[str]) -> list[int]:
    """A representative for each text, itself or another. Texts share one if they are equal by the rule for documents,
    have equal contexts, or are linked by a chain of such texts.
    """
    leader = list(range(len(texts)))

    def leader_of(number: int) -> int:
        while leader[number] != number:
            number = leader[number]
        return number

    first_texts: dict[tuple[int, ...] | bytes, int] = {}
    for number, (context, text) in enumerate(zip(contexts, texts, strict=True)):
        for fact in (context, normalised_digest([text])):
            leader[leader_of(number)] = leader_of(first_texts.setdefault(fact, number))
    return list(map(leader_of, range(len(texts))))
