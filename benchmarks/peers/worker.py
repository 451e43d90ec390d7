"""Times whole training steps of one toolkit, in that toolkit's own environment; prints one line of JSON.

    python worker.py TOOLKIT ARCHITECTURE D_IN D_SAE K BATCH STEPS DEVICE

Each toolkit is used as its users use it: its own trainer's step with its default options, which is forward, losses,
backward, clipping or projection, optimiser, schedule and the record of dead features. Of this package the whole of
`sae.train` is timed: input, normalisation and logging too.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from data import activations  # pyright: ignore[reportMissingImports]

GPU_BLOCK = 20


@dataclass(frozen=True)
class Task:
    """What is to be trained and timed."""

    architecture: str
    d_in: int
    d_sae: int
    k: int
    batch: int
    steps: int
    device: str

    @property
    def block(self) -> int:
        """Steps between two moments at which the clock is read: on a GPU some, so that nothing waits for it."""
        return 1 if self.device == "cpu" else GPU_BLOCK

    def time(self, step: Callable[[int, torch.Tensor], object], data: list[torch.Tensor]) -> list[float]:
        """Seconds per step of every block; the first block, which warms up, is left out."""
        seconds = []
        for block in range(self.steps + 1):
            start = time.perf_counter()
            for inner in range(self.block):
                number = block * self.block + inner
                step(number, data[number % len(data)])
            if self.device != "cpu":
                torch.cuda.synchronize()
            seconds.append((time.perf_counter() - start) / self.block)
        return seconds[1:]


class Clocked:
    """Batches over and over; `reads` has the time at which each was asked for."""

    def __init__(self, batches: list[torch.Tensor]) -> None:
        self.batches, self.reads = batches, list[float]()

    def __iter__(self) -> Iterator[torch.Tensor]:
        for batch in self.batches:
            self.reads.append(time.perf_counter())
            yield batch


def ours(task: Task, data: list[torch.Tensor], products: str = "float32") -> list[float]:
    """`sae.train`, with a step's share of the log, to which it writes every fifty steps by default.

    On a GPU blocks from one line of the log to the next are timed. On a CPU steps are timed from the request for one
    batch to that for the next, and a fiftieth of what the last line took is added: BatchTopK finds its threshold then.
    """
    import sae
    from sae.config.settings import DictionaryConfig, TrainConfig

    every = TrainConfig().log_every
    steps = task.steps + 2 if task.device == "cpu" else every * (task.steps + 1)
    settings = TrainConfig(tokens=steps * task.batch, batch_size=task.batch, encoder_dtype=products)  # type: ignore[arg-type]
    shape = DictionaryConfig(architecture=task.architecture, d_sae=task.d_sae, k=task.k)  # type: ignore[arg-type]
    clocked, lines = Clocked(data), list[float]()
    source = sae.IterableSource(clocked)
    clocked.reads.clear()
    sae.train(
        source, shape, settings, device=task.device, progress=lambda *_: lines.append(time.perf_counter())
    )  # fmt: skip
    if task.device != "cpu":
        return [(after - before) / every for before, after in itertools.pairwise(lines)]
    begun = clocked.reads[:steps]
    seconds = [after - before for before, after in itertools.pairwise(begun)][1:]
    line = lines[-1] - begun[-1] - statistics.median(seconds)
    return [step + max(0.0, line) / every for step in seconds]


def ours_bfloat16(task: Task, data: list[torch.Tensor]) -> list[float]:
    """The same with the encoder's product in bfloat16; the weights stay float32."""
    return ours(task, data, "bfloat16")


def saelens(task: Task, data: list[torch.Tensor]) -> list[float]:
    """`SAETrainer._train_step`."""
    from sae_lens.config import SAETrainerConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.saes.batchtopk_sae import (  # pyright: ignore[reportMissingImports]
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
    )
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]

    shape = {"d_in": task.d_in, "d_sae": task.d_sae, "k": task.k, "device": task.device, "dtype": "float32"}
    if task.architecture == "topk":
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**shape))
    else:
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**shape))
    settings = SAETrainerConfig(
        total_training_samples=1000 * task.batch, train_batch_size_samples=task.batch, device=task.device, lr_end=3e-5
    )
    trainer = SAETrainer(cfg=settings, sae=sae.to(task.device), data_provider=iter(()))
    return task.time(lambda number, x: trainer._train_step(sae=trainer.sae, sae_in=x), data)


def dictionary_learning(task: Task, data: list[torch.Tensor]) -> list[float]:
    """`TopKTrainer.update`, `BatchTopKTrainer.update`."""
    from dictionary_learning.trainers import batch_top_k, top_k  # pyright: ignore[reportMissingImports]

    trainers = {"topk": top_k.TopKTrainer, "batch_topk": batch_top_k.BatchTopKTrainer}
    trainer = trainers[task.architecture](
        steps=10_000, activation_dim=task.d_in, dict_size=task.d_sae, k=task.k, layer=0, lm_name="none",
        device=task.device,
    )  # fmt: skip
    return task.time(trainer.update, data)


def sparsify(
    task: Task, data: list[torch.Tensor], *, products: torch.dtype = torch.bfloat16, adam: bool = False
) -> list[float]:  # fmt: skip
    """What `sparsify.Trainer` does to one coder, by default with signum and autocast; it has no BatchTopK.

    On a CPU its kernels fall back to `embedding_bag`.
    """
    from schedulefree import ScheduleFreeWrapper  # pyright: ignore[reportMissingImports]
    from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]
    from sparsify.sign_sgd import SignSGD  # pyright: ignore[reportMissingImports]

    coder = SparseCoder(task.d_in, SparseCoderConfig(num_latents=task.d_sae, k=task.k), device=task.device)
    scale = (task.d_sae / 2**14) ** 0.5
    if adam:
        optimizer = torch.optim.Adam(coder.parameters(), lr=2e-4 / scale)
    else:
        optimizer = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=5e-3 / scale), momentum=0.95)
        optimizer.train()
    silent = torch.zeros(task.d_sae, dtype=torch.long, device=task.device)

    def step(number: int, x: torch.Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        with torch.autocast(task.device, dtype=torch.bfloat16, enabled=products is torch.bfloat16):
            out = coder(x)
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        fired = torch.zeros(task.d_sae, dtype=torch.bool, device=task.device)
        fired[out.latent_indices.flatten()] = True
        silent.add_(len(x)).masked_fill_(fired, 0)

    return task.time(step, data)


def sparsify_float32(task: Task, data: list[torch.Tensor]) -> list[float]:
    """The same without autocast, as sparsify trains where the hardware has no bfloat16."""
    return sparsify(task, data, products=torch.float32)


def sparsify_adam(task: Task, data: list[torch.Tensor]) -> list[float]:
    """With Adam in place of signum."""
    return sparsify(task, data, adam=True)


def sparsify_adam_float32(task: Task, data: list[torch.Tensor]) -> list[float]:
    return sparsify(task, data, products=torch.float32, adam=True)


TOOLKITS = {
    "sae": (ours, "sae"),
    "sae, bfloat16 products": (ours_bfloat16, "sae"),
    "saelens": (saelens, "sae-lens"),
    "dictionary_learning": (dictionary_learning, "dictionary-learning"),
    "sparsify": (sparsify, "eai-sparsify"),
    "sparsify, float32": (sparsify_float32, "eai-sparsify"),
    "sparsify, Adam": (sparsify_adam, "eai-sparsify"),
    "sparsify, Adam, float32": (sparsify_adam_float32, "eai-sparsify"),
}


def main() -> None:
    toolkit, architecture, d_in, d_sae, k, batch, steps, device = sys.argv[1:]
    task = Task(architecture, int(d_in), int(d_sae), int(k), int(batch), int(steps), device)
    torch.manual_seed(0)
    function, package = TOOLKITS[toolkit]
    data = [x.to(device) for x in activations(2, task.batch, task.d_in)]
    seconds = function(task, data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {
        "seconds": seconds,
        "peak_bytes": peak if device == "cpu" else torch.cuda.max_memory_allocated(),
        "version": importlib.metadata.version(package),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
