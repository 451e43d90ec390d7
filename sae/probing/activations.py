"""A language model's activations at the rows of examples: read once and saved to a file."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.activations.shards import model_not_finite
from sae.config.progress import StageProgress
from sae.errors import DataError, ShapeError
from sae.files.kept import KeptResult
from sae.files.paths import short_name
from sae.files.reading import load_tensors, read_object, taken_apart
from sae.files.writing import tensors_content
from sae.model.language_model import LanguageModel
from sae.numerics.modes import in_own_modes
from sae.probing.examples import Examples

TOKENS_AT_ONCE = 2048
ROWS_AT_ONCE = 2048


@runtime_checkable
class Encoder(Protocol):
    """Any object that encodes activations into latents."""

    def encode(self, x: Tensor, /) -> Tensor:
        """`[batch, d_in]` → `[batch, d_sae]`."""
        ...


@dataclass(frozen=True)
class RowTexts:
    """Where rows of activations are in their texts.

    Attributes:
        pieces: the texts of each context's tokens.
        context: context of each row.
        position: the row's token in its context.
    """

    pieces: tuple[tuple[str, ...], ...]
    context: tuple[int, ...]
    position: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    @staticmethod
    def from_json(record: dict[str, Any]) -> RowTexts:
        """Inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: the record is not one.
        """
        pieces = tuple(tuple(map(str, context)) for context in record["pieces"])
        rows = tuple(map(int, record["context"])), tuple(map(int, record["position"]))
        if any(min(row) < 0 or row[1] >= len(pieces[row[0]]) for row in zip(*rows, strict=True)):
            raise ValueError("a position is not in its context")
        return RowTexts(pieces, *rows)


@dataclass(frozen=True)
class LabelledActivations:
    """Activations of a data set's examples.

    Attributes:
        rows: raw activations.
        example: the example each row belongs to, ascending from 0; rows of the same example are averaged.
        labels: label of each example.
        groups: group of each example; examples of the same group are dependent.
        left_out: number of texts and spans left out: without a label, or without a token that counts.
        equal: number of texts equal to an earlier one, as in `Examples`.
        texts: the tokens around each row, if they were asked for.
    """

    rows: Float[Tensor, "rows d_in"]
    example: Int[Tensor, " rows"]
    labels: tuple[str, ...]
    groups: Int[Tensor, " examples"]
    left_out: int = 0
    equal: int = 0
    texts: RowTexts | None = None

    def dense(self) -> Float[Tensor, "examples d_in"]:
        """Activations per example."""
        return self._by_example(self.rows)

    @torch.no_grad()
    def latents(self, dictionary: Encoder) -> Float[Tensor, "examples d_sae"]:
        """Latents per example; for several rows, the mean of their latents, not the latents of their mean.

        Raises:
            ShapeError: latents do not have shape `[rows, d_sae]` or are not finite, or the dictionary takes another
                width.
        """
        total: Tensor | None = None
        for rows, example in zip(self.rows.split(ROWS_AT_ONCE), self.example.split(ROWS_AT_ONCE), strict=True):
            latents = dictionary.encode(rows).detach().float().cpu()
            if latents.ndim != 2 or len(latents) != len(rows) or not bool(latents.isfinite().all()):
                raise ShapeError(
                    f"latents of shape {list(latents.shape)} from activations {list(rows.shape)}: expected finite ones "
                    f"of [{len(rows)}, d_sae] from encode"
                )
            if total is None:
                total = latents.new_zeros(len(self.labels), latents.shape[1])
            total.index_add_(0, example, latents)
        assert total is not None
        return total / self._counts()

    def _by_example(self, rows: Tensor) -> Tensor:
        return rows.new_zeros(len(self.labels), rows.shape[1]).index_add_(0, self.example, rows) / self._counts()

    def _counts(self) -> Tensor:
        return torch.bincount(self.example, minlength=len(self.labels))[:, None]


@in_own_modes
def read_activations(
    language_model: LanguageModel, hook: str, examples: Examples, progress: StageProgress | None = None
) -> LabelledActivations:
    """Run the model up to the hook point over all contexts and keep the rows of the examples.

    Contexts are sorted by length and run in batches, padded on the right. In a causal model, padding does not affect
    the tokens before it.

    Raises:
        DataError: an activation is not finite.
        ModelError: the model's context is too short, or it has no embedding for a token.
    """
    longest = max(map(len, examples.contexts))
    language_model.check_context_length(longest)
    language_model.check_id(max(map(max, examples.contexts)))
    rows_by_context: dict[int, list[int]] = {}
    for row, context in enumerate(examples.context):
        rows_by_context.setdefault(context, []).append(row)
    order = sorted(rows_by_context, key=lambda number: len(examples.contexts[number]))
    rows: Tensor | None = None
    done, total = 0, sum(len(examples.contexts[number]) for number in order)
    if progress is not None:
        progress(0, total)
    while order:
        length = len(examples.contexts[order[-1]])
        batch = [order.pop() for _ in range(min(len(order), max(1, TOKENS_AT_ONCE // length)))]
        padded = [_padded(examples.contexts[number], length) for number in batch]
        tokens = torch.tensor(padded, device=language_model.device)
        activations = language_model.activations(tokens, [hook])[hook].float().cpu()
        if rows is None:
            rows = activations.new_zeros(len(examples.example), activations.shape[-1])
        for place, number in enumerate(batch):
            context_rows = rows_by_context[number]
            rows[context_rows] = activations[place, [examples.position[row] for row in context_rows]]
            done += len(examples.contexts[number])
        if progress is not None:
            progress(done, total)
    assert rows is not None
    if not bool(rows.isfinite().all()):
        raise DataError(f"hook {hook!r}: {model_not_finite(language_model.info.dtype)}")
    return LabelledActivations(
        rows, torch.tensor(examples.example), examples.labels, torch.tensor(examples.groups), examples.left_out,
        examples.equal,
    )  # fmt: skip


def save_activations(activations: LabelledActivations, folder: Path, name: str, key: str) -> None:
    """Write a .safetensors file, then a .json file: if the latter exists, the former is complete.

    Args:
        activations: activations of a data set.
        folder: where the files are written.
        name: name of the data set; file names begin with it.
        key: hash of everything that determines the activations; file names end with its prefix, the .json has all of
            it.
    """
    kept = _kept(name, key)
    tensors = {part: getattr(activations, part).contiguous() for part in ("rows", "example", "groups")}
    record: dict[str, Any] = {
        "labels": activations.labels, "left_out": activations.left_out, "equal": activations.equal,
    }  # fmt: skip
    if activations.texts is not None:
        record["texts"] = activations.texts.to_json()
    kept.write(folder, {"key": key, **record}, {kept.beside[0]: tensors_content(tensors)})


def load_activations(folder: Path, name: str, key: str) -> LabelledActivations | None:
    """Load what `save_activations` wrote with the same key; None if there is nothing.

    Earlier versions did not write the key into the file. Their files count as missing, with a warning.

    Raises:
        DamagedError: a file is damaged.
    """
    kept = _kept(name, key)
    if not kept.stands(folder):
        return None
    index, rows = folder / kept.index, folder / kept.beside[0]
    record = read_object(index)
    if "key" not in record:
        warnings.warn(
            f"{str(folder)!r}: activations saved by an earlier version do not say what they are from; they are read "
            "again",
            stacklevel=2,
        )
    if record.get("key") != key:
        return None
    tensors = load_tensors(rows)
    with taken_apart(index):
        labels = tuple(map(str, record["labels"]))
        texts = RowTexts.from_json(record["texts"]) if "texts" in record else None
        data = LabelledActivations(
            **tensors, labels=labels, left_out=int(record["left_out"]), equal=int(record["equal"]), texts=texts,
        )  # fmt: skip
        examples = len(labels), int(data.example.max()) + 1
        rows = len(data.rows) if texts is None else len(texts.context)
        if rows != len(data.rows):
            raise ValueError("it has texts of other rows than the activations next to it")
        if data.rows.ndim != 2 or len(data.example) != len(data.rows) or (len(data.groups), *examples[1:]) != examples:
            raise ValueError("it does not fit the activations next to it")
        return data


def _kept(name: str, key: str) -> KeptResult:
    stem = f"{short_name(name)}-{key[:16]}"
    return KeptResult(None, f"{stem}.json", (f"{stem}.safetensors",))


def _padded(context: tuple[int, ...], length: int) -> list[int]:
    return [*context, *[context[-1]] * (length - len(context))]
