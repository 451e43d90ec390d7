"""Training with its input, on a GPU: from a cache on disk, and from a model that runs beside it."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gpu_model
import torch
from ceilings import synchronise
from gpu_parts import Context, PartSkipped
from harvest import HOOK, write_synthetic_cache

from sae import ActivationCache, ActivationLoader, IterableSource, train
from sae.config.settings import DictionaryConfig, TrainConfig
from sae.errors import SaeError
from sae.runs.run import Run


@dataclass(frozen=True)
class Sizes:
    """Shapes of the trainings, (d_sae, batch) each, rows of the cache, and steps between lines of the log."""

    shapes: Sequence[tuple[int, int]]
    rows: int
    d_in: int
    k: int
    every: int


REAL = Sizes(((24_576, 8192), (6144, 2048), (131_072, 8192)), 1_048_576, 768, 32, 50)
DRY = Sizes(((256, 128),), 16_384, 32, 4, 4)


class EnoughRead(Exception):  # noqa: N818
    """The road has been measured for as long as it should."""


def stopping(seconds: float, lines: list[float]) -> Callable[..., None]:
    """A progress callback that notes its times and ends a training after some seconds, but at least two lines."""

    def progress(*_: object) -> None:
        lines.append(time.perf_counter())
        if len(lines) > 2 and lines[-1] - lines[0] >= seconds:
            raise EnoughRead

    return progress


def rate(source: Any, d_sae: int, batch: int, sizes: Sizes, device: str, seconds: float) -> float:
    """Tokens per second of `sae.train`, from the first line of the log to the last."""
    lines: list[float] = []
    settings = TrainConfig(tokens=10**10, batch_size=batch, log_every=sizes.every)
    with contextlib.suppress(EnoughRead):
        train(
            source, DictionaryConfig(d_sae=d_sae, k=sizes.k), settings, device=device,
            progress=stopping(seconds, lines),
        )  # fmt: skip
    return (len(lines) - 1) * sizes.every * batch / (lines[-1] - lines[0])


def cached(context: Context) -> None:
    """The loader alone, and `sae.train` from the loader compared with `sae.train` from batches on the device."""
    sizes = DRY if context.dry else REAL
    begun = time.monotonic()
    cache = ActivationCache(write_synthetic_cache(context.folder / "cache", sizes.rows, sizes.d_in))
    for name in cache.manifest.files:  # into the page cache
        (cache.path / name).read_bytes()
    share = (context.seconds - (time.monotonic() - begun) - 5) / (3 * len(sizes.shapes))
    share = min(share, 0.3 if context.dry else 8.0)
    for d_sae, batch in sizes.shapes:
        shape = f"{sizes.d_in:,} → {d_sae:,}, batch {batch:,}, k {sizes.k}"
        alone = loader_alone(loader(cache, batch, context), context.device, share)
        inputs = list(itertools.islice(loader(cache, batch, context), 8))
        steps = rate(IterableSource(inputs), d_sae, batch, sizes, context.device, share)
        whole = rate(loader(cache, batch, context), d_sae, batch, sizes, context.device, share)
        for what, speed in (("loader to step", whole), ("loader alone", alone)):
            row = {"what": f"{what}, {shape}", "tokens_per_second": speed}
            context.emit(f"{what} {shape}", {**row, "beside": "steps alone", "beside_tokens_per_second": steps})


def loader(cache: ActivationCache, batch: int, context: Context) -> ActivationLoader:
    return ActivationLoader(cache, HOOK, batch_size=batch, device=context.device)


def loader_alone(batches: ActivationLoader, device: str, seconds: float) -> float:
    """Rows per second that arrive on the device, after the first pool."""
    reading = iter(batches)
    next(reading)
    synchronise(device)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(4):
            next(reading)
            count += 1
        synchronise(device)
    seconds = time.perf_counter() - start
    reading.close()  # type: ignore[attr-defined]
    return count * batches.batch_size / seconds


def live(context: Context) -> None:
    """`Run.train` from a running model, compared with the model's passes alone and then the steps alone.

    The model has random weights in GPT-2 small's shape; what is stored for a live training is stored before.
    """
    sizes = DRY if context.dry else REAL
    d_sae, batch = sizes.shapes[0]
    contexts = 4 if context.dry else 128
    config = gpu_model.model_config(
        context, context.folder / "live",
        model={"dtype": "bfloat16" if context.on_gpu else "float32"},
        harvest={"live": True, "batch_contexts": contexts},
        dictionary={"d_sae": d_sae, "k": sizes.k},
        train={"batch_size": batch, "log_every": sizes.every, "tokens": 10**9},
    )  # fmt: skip
    share = 0.3 if context.dry else context.seconds / 4
    lines: list[float] = []
    noted = stopping(share, lines)
    run = Run(config, lambda stage, done, total: noted() if stage == "train" and done else None)
    try:
        model = run.language_model
    except (ImportError, SaeError) as error:
        raise PartSkipped(f"the language model cannot be loaded: {error}") from None
    run.harvest()
    passes = gpu_model.best_rate(context, partial(model.activations, hooks=config.harvest.hooks), [contexts])
    inputs = [torch.randn(batch, sizes.d_in, device=context.device) for _ in range(8)]
    steps = rate(IterableSource(inputs), d_sae, batch, sizes, context.device, share)
    with contextlib.suppress(EnoughRead):
        run.train()
    context.emit(
        "live",
        {
            "what": f"model to step, {sizes.d_in:,} → {d_sae:,}, batch {batch:,}, k {sizes.k}",
            "tokens_per_second": (len(lines) - 1) * sizes.every * batch / (lines[-1] - lines[0]),
            "beside": "passes alone, then steps alone",
            "beside_tokens_per_second": 1 / (1 / passes + 1 / steps),
        },
    )
