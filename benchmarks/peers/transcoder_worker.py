"""Trains one transcoder with one toolkit, in that toolkit's environment, and scores it; prints one line of JSON.

    python transcoder_worker.py TOOLKIT SKIP DATA D_SAE K STEPS BATCH SEED

DATA is what `benchmarks/transcoders.py` wrote: input and target, scaled to E‖x‖² = d each, with the scales. Every
toolkit sees the same rows in the same order; a name that ends in `raw` asks for activations as they were. sparsify does
what its `Trainer` does to one coder, in float32, with its default learning rates; a warmup that would not end within
the steps is cut to a twentieth of them. All are scored on the same held-out rows.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Function = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Inputs → reconstructions and dense features."""


class Pairs:
    """Batches of one side without end, a new order each epoch, the same for both sides and all toolkits."""

    def __init__(self, rows: Tensor, batch: int, seed: int) -> None:
        self.rows, self.batch, self.seed = rows, batch, seed

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(1234 + self.seed)
        while True:
            order = torch.randperm(len(self.rows), generator=generator)
            for start in range(0, len(order) - self.batch + 1, self.batch):
                yield self.rows[order[start : start + self.batch]].float()


def ours(x: Pairs, y: Pairs, skip: bool, d_sae: int, k: int, steps: int, _: str) -> Function:
    """`sae.train` with its defaults."""
    import sae

    made = sae.train(
        sae.IterableSource(x), sae.DictionaryConfig(architecture="topk", d_sae=d_sae, k=k, skip=skip),
        sae.TrainConfig(tokens=steps * x.batch, batch_size=x.batch), target=sae.IterableSource(y), seed=x.seed,
    )  # fmt: skip
    return lambda rows: (made(rows), made.encode(rows))


def sparsify(x: Pairs, y: Pairs, skip: bool, d_sae: int, k: int, steps: int, name: str) -> Function:
    """Its coder with `transcode`, trained as its `Trainer` does."""
    from schedulefree import ScheduleFreeWrapper  # pyright: ignore[reportMissingImports]
    from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]
    from sparsify.sign_sgd import SignSGD  # pyright: ignore[reportMissingImports]
    from transformers import get_linear_schedule_with_warmup

    torch.manual_seed(x.seed)
    config = SparseCoderConfig(num_latents=d_sae, k=k, skip_connection=skip, transcode=True)
    coder = SparseCoder(x.rows.shape[1], config, dtype=torch.float32)
    scale, scheduler = (d_sae / 2**14) ** 0.5, None
    if "Adam" in name:
        optimizer: Any = torch.optim.Adam(coder.parameters(), lr=2e-4 / scale)
        scheduler = get_linear_schedule_with_warmup(optimizer, min(1000, steps // 20), steps)
    else:
        optimizer = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=5e-3 / scale), momentum=0.95)
        optimizer.train()
    for number, inputs, targets in zip(range(steps), x, y, strict=False):
        if number == 0:
            coder.encoder.bias.data = -inputs.mean(0) @ coder.encoder.weight.data.T
            coder.b_dec.data = targets.mean(0)
        coder(inputs, targets).fvu.backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    if scheduler is None:
        optimizer.eval()

    def function(rows: Tensor) -> tuple[Tensor, Tensor]:
        out = coder(rows)
        features = rows.new_zeros(len(rows), d_sae)
        return out.sae_out.float(), features.scatter_(1, out.latent_indices, out.latent_acts.float())

    return function


TOOLKITS = {"sae": (ours, "sae"), "sparsify": (sparsify, "eai-sparsify")}


def main() -> None:
    name, skip, path, *numbers = sys.argv[1:]
    d_sae, k, steps, batch, seed = map(int, numbers)
    make, package = TOOLKITS[name.partition(",")[0]]
    data = torch.load(Path(path), weights_only=True)
    factors = {side: 1 / data[f"{side}_scale"] if name.endswith("raw") else 1.0 for side in ("x", "y")}
    sides = {side: data[side].float() * factor for side, factor in factors.items()}
    x, y = (Pairs(sides[side], batch, seed) for side in ("x", "y"))
    start = time.perf_counter()
    function = make(x, y, bool(int(skip)), d_sae, k, steps, name)
    seconds = time.perf_counter() - start
    held_out = {side: data[f"{side}_held_out"] * factor for side, factor in factors.items()}
    error, fired, l0 = 0.0, torch.zeros(d_sae, dtype=torch.bool), 0.0
    with torch.no_grad():
        for inputs, targets in zip(held_out["x"].split(1024), held_out["y"].split(1024), strict=True):
            reconstruction, features = function(inputs)
            error += float((targets.double() - reconstruction.double()).square().sum())
            fired |= (features > 0).any(0)
            l0 += float((features > 0).sum())
    target = held_out["y"].double()
    result = {
        "fvu": error / float((target - target.mean(0)).square().sum()),
        "l0": l0 / len(target),
        "never_fired": int((~fired).sum()),
        "seconds": seconds,
        "version": importlib.metadata.version(package),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
