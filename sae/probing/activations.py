"""A language model's activations at the rows that examples are made of; read once, kept in a file."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.activations.harvest import model_not_finite
from sae.config.progress import StageProgress
from sae.errors import DataError, ShapeError
from sae.files.paths import short_name
from sae.files.reading import load_tensors, read_object, taken_apart
from sae.files.writing import stands, write_json, write_tensors
from sae.model.language_model import LanguageModel
from sae.numerics.modes import in_own_modes
from sae.probing.examples import Examples

TOKENS_AT_ONCE = 2048
ROWS_AT_ONCE = 2048


@runtime_checkable
class Encoder(Protocol):
    """Anything that turns activations into latents."""

    def encode(self, x: Tensor, /) -> Tensor:
        """`[batch, d_in]` → `[batch, d_sae]`."""
        ...


@dataclass(frozen=True)
class LabelledActivations:
    """Activations of a data set's examples.

    Attributes:
        rows: raw activations.
        example: the example each row belongs to, ascending from 0; examples of several rows are averaged.
        labels: of each example.
        groups: of each example; those of one group depend on each other.
        left_out: texts and spans that are no examples: without a label, or without a token that counts.
        equal: texts that equal one before them, as `Examples` has it.
    """

    rows: Float[Tensor, "rows d_in"]
    example: Int[Tensor, " rows"]
    labels: tuple[str, ...]
    groups: Int[Tensor, " examples"]
    left_out: int = 0
    equal: int = 0

    def dense(self) -> Float[Tensor, "examples d_in"]:
        """Activations by example."""
        return self._by_example(self.rows)

    @torch.no_grad()
    def latents(self, dictionary: Encoder) -> Float[Tensor, "examples d_sae"]:
        """Latents by example: of several rows the mean of their latents, not the latents of their mean.

        Raises:
            ShapeError: they are of no `[rows, d_sae]`, not finite, or the dictionary takes another width.
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
    """Run the model up to the hook point over all contexts, and keep the rows of the examples.

    Contexts are read by length, several at once, filled up on the right with tokens that come after all that is read:
    in a causal model they change nothing before them.

    Raises:
        DataError: an activation is not finite.
        ModelError: the model reads fewer tokens, or has no embedding of one.
    """
    longest = max(map(len, examples.contexts))
    language_model.check_context_length(longest)
    language_model.check_id(max(map(max, examples.contexts)))
    wanted: dict[int, list[int]] = {}
    for row, context in enumerate(examples.context):
        wanted.setdefault(context, []).append(row)
    order = sorted(wanted, key=lambda number: len(examples.contexts[number]))
    rows: Tensor | None = None
    done, total = 0, sum(len(examples.contexts[number]) for number in order)
    if progress is not None:
        progress(0, total)
    while order:
        length = len(examples.contexts[order[-1]])
        batch = [order.pop() for _ in range(min(len(order), max(1, TOKENS_AT_ONCE // length)))]
        padded = [_filled(examples.contexts[number], length) for number in batch]
        tokens = torch.tensor(padded, device=language_model.device)
        activations = language_model.activations(tokens, [hook])[hook].float().cpu()
        if rows is None:
            rows = activations.new_zeros(len(examples.example), activations.shape[-1])
        for place, number in enumerate(batch):
            of_context = wanted[number]
            rows[of_context] = activations[place, [examples.position[row] for row in of_context]]
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
    """Write a .safetensors and a .json file, the latter last: where it is, the other is whole.

    Args:
        activations: of a data set.
        folder: for the files.
        name: of the data set; the files' names begin like it.
        key: hash of all that the activations depend on; the files' names end with its beginning, the .json holds it.
    """
    index, rows = _files(folder, name, key)
    write_tensors(rows, {part: getattr(activations, part).contiguous() for part in ("rows", "example", "groups")})
    record = {"labels": activations.labels, "left_out": activations.left_out, "equal": activations.equal}
    write_json(index, {"key": key, **record})


def load_activations(folder: Path, name: str, key: str) -> LabelledActivations | None:
    """What `save_activations` wrote with the same key; None if it is not there.

    Earlier versions wrote no key into the file. Theirs count as not there, with a warning.

    Raises:
        DamagedError: a file is damaged.
    """
    index, rows = _files(folder, name, key)
    if not stands(index) or not stands(rows):
        return None
    record = read_object(index)
    if "key" not in record:
        warnings.warn(
            f"{str(folder)!r}: activations that an earlier version kept do not say what they are of; they are read "
            "anew",
            stacklevel=2,
        )
    if record.get("key") != key:
        return None
    tensors = load_tensors(rows)
    with taken_apart(index):
        labels = tuple(map(str, record["labels"]))
        held = LabelledActivations(
            **tensors, labels=labels, left_out=int(record["left_out"]), equal=int(record["equal"])
        )  # fmt: skip
        examples = len(labels), int(held.example.max()) + 1
        if held.rows.ndim != 2 or len(held.example) != len(held.rows) or (len(held.groups), *examples[1:]) != examples:
            raise ValueError("it does not fit the activations beside it")
        return held


def _files(folder: Path, name: str, key: str) -> tuple[Path, Path]:
    stem = f"{short_name(name)}-{key[:16]}"
    return folder / f"{stem}.json", folder / f"{stem}.safetensors"


def _filled(context: tuple[int, ...], length: int) -> list[int]:
    return [*context, *[context[-1]] * (length - len(context))]
