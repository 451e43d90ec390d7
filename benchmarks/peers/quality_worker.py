"""Trains one dictionary with one toolkit, in that toolkit's own environment, and scores it; prints one line of JSON.

    python quality_worker.py TOOLKIT ARCHITECTURE DATA D_SAE K STEPS BATCH SEED COEFFICIENT DEVICE

DATA is what `benchmarks/quality.py` wrote: activations scaled to E‖x‖² = d_in. Every toolkit sees the same batches in
the same order and is used with its default options, by its own trainer; with dictionary_learning, other rows take the
place of those with more than ten times the median norm, which its documentation suggests to leave out. COEFFICIENT is
the weight of the sparsity penalty where the architecture has one, or `default`. Warmups that would not end within the
steps are cut to a twentieth of them, that of dictionary_learning's penalty to a tenth. All are scored on the same
held-out rows, by the inference that their users get.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Reconstruct = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Activations → reconstruction and dense features."""


@dataclass(frozen=True)
class Task:
    """What is to be trained."""

    architecture: str
    train: Tensor
    held_out: Tensor
    d_sae: int
    k: int
    steps: int
    batch: int
    seed: int
    coefficient: float | None
    device: str

    @property
    def d_in(self) -> int:
        return self.train.shape[1]

    @property
    def warmup(self) -> int:
        return min(1000, self.steps // 20)

    @property
    def penalty(self) -> dict[str, float]:
        """The coefficient by the name that it has here and in SAELens; nothing where there is none."""
        name = "l0_coefficient" if self.architecture == "jumprelu" else "l1_coefficient"
        return {} if self.coefficient is None else {name: self.coefficient}

    def __iter__(self) -> Iterator[Tensor]:
        """Batches without end, a new order each epoch, the same for every toolkit."""
        generator = torch.Generator().manual_seed(1234 + self.seed)
        while True:
            order = torch.randperm(len(self.train), generator=generator)
            for start in range(0, len(order) - self.batch + 1, self.batch):
                yield self.train[order[start : start + self.batch].to(self.device)].float()

    def batches(self) -> Iterator[tuple[int, Tensor]]:
        return zip(range(self.steps), self, strict=False)


def ours(task: Task) -> dict[str, Reconstruct]:
    """`sae.train` with its defaults."""
    import sae
    from sae.config.settings import DictionaryConfig, TrainConfig

    settings = TrainConfig(tokens=task.steps * task.batch, batch_size=task.batch, **task.penalty)  # type: ignore[arg-type]
    shape = DictionaryConfig(architecture=task.architecture, d_sae=task.d_sae, k=task.k)  # type: ignore[arg-type]
    made = sae.train(sae.IterableSource(task), shape, settings, seed=task.seed, device=task.device).to(task.device)
    return {"": lambda x: (made(x), made.encode(x))}


def saelens_target_l0(task: Task) -> dict[str, Reconstruct]:
    """JumpReLU whose penalty aims at k features per token: its option `quadratic` with `target_l0`."""
    return saelens(task, {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(task.k)})


def saelens(task: Task, options: dict[str, Any] | None = None) -> dict[str, Reconstruct]:
    """`SAETrainer._train_step`."""
    from sae_lens import saes  # pyright: ignore[reportMissingImports]
    from sae_lens.config import SAETrainerConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]

    names = {
        "relu": "Standard", "gated": "Gated", "topk": "TopK", "batch_topk": "BatchTopK", "jumprelu": "JumpReLU",
        "matryoshka": "MatryoshkaBatchTopK",
    }  # fmt: skip
    name = names[task.architecture]
    shape = {"d_in": task.d_in, "d_sae": task.d_sae, "device": task.device, "dtype": "float32"}
    if task.architecture in ("topk", "batch_topk", "matryoshka"):
        shape["k"] = task.k
    if task.architecture == "matryoshka":
        shape["matryoshka_widths"] = [round(s * task.d_sae) for s in (1 / 32, 3 / 32, 7 / 32, 15 / 32)]
    shape |= task.penalty | (options or {})
    torch.manual_seed(task.seed)
    made = getattr(saes, f"{name}TrainingSAE")(getattr(saes, f"{name}TrainingSAEConfig")(**shape))
    settings = SAETrainerConfig(
        total_training_samples=task.steps * task.batch,
        train_batch_size_samples=task.batch,
        device=task.device,
        lr_end=3e-5,
    )
    trainer = SAETrainer(cfg=settings, sae=made, data_provider=iter(()))
    for _, x in task.batches():
        trainer._train_step(sae=trainer.sae, sae_in=x)
        trainer.n_training_steps += 1
    made.eval()

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        features = made.encode(x)
        return made.decode(features), features

    def by_threshold(x: Tensor) -> tuple[Tensor, Tensor]:
        """As the dictionary that it saves for its users."""
        _, pre = made.encode_with_hidden_pre(x)
        features = pre.relu() * (pre > made.topk_threshold)
        return made.decode(features), features

    if task.architecture in ("batch_topk", "matryoshka"):
        return {"": by_threshold, "batch rule": reconstruct}
    return {"": reconstruct}


def dictionary_learning(task: Task) -> dict[str, Reconstruct]:
    """The trainers' `update`, on rows as its buffer gives them with the suggested `max_activation_norm_multiple=10`."""
    from dictionary_learning import trainers as t  # pyright: ignore[reportMissingImports]

    norms = task.train.norm(dim=1)
    is_sink, rows = norms > 10 * norms.median(), torch.arange(len(norms))
    rows[is_sink] = int(is_sink.long().argmin())  # another row, so that all others stay where they are
    task = replace(task, train=task.train[rows])
    common = {
        "steps": task.steps, "activation_dim": task.d_in, "dict_size": task.d_sae, "layer": 0, "lm_name": "none",
        "device": task.device, "seed": task.seed, "warmup_steps": task.warmup,
    }  # fmt: skip
    chosen = {"k": task.k, "threshold_start_step": min(1000, task.steps // 2)}
    penalty = {} if task.coefficient is None else {"l1_penalty": task.coefficient}
    sparsity_warmup = {"sparsity_warmup_steps": min(2000, task.steps // 10)}
    if task.architecture == "topk":
        trainer = t.top_k.TopKTrainer(**common, **chosen)
    elif task.architecture == "batch_topk":
        trainer = t.batch_top_k.BatchTopKTrainer(**common, **chosen)
    elif task.architecture == "matryoshka":
        fractions = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32]
        trainer = t.matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer(**common, **chosen, group_fractions=fractions)
    elif task.architecture == "jumprelu":
        trainer = t.jumprelu.JumpReluTrainer(**common, **sparsity_warmup, target_l0=task.k)
    elif task.architecture == "gated":
        trainer = t.gdm.GatedSAETrainer(**common, **sparsity_warmup, **penalty)
    else:
        trainer = t.standard.StandardTrainerAprilUpdate(**common, **sparsity_warmup, **penalty)
    for step, x in task.batches():
        trainer.update(step, x)
    made = trainer.ae.eval()

    def by_rule(**how: bool) -> Reconstruct:
        def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
            features = made.encode(x, **how)
            return made.decode(features), features

        return reconstruct

    if task.architecture in ("batch_topk", "matryoshka"):
        return {"": by_rule(use_threshold=True), "batch rule": by_rule(use_threshold=False)}
    return {"": by_rule()}


TOOLKITS = {
    "sae": (ours, "sae"),
    "saelens": (saelens, "sae-lens"),
    "saelens, target L0": (saelens_target_l0, "sae-lens"),
    "dictionary_learning": (dictionary_learning, "dictionary-learning"),
}


@torch.no_grad()
def score(reconstruct: Reconstruct, held_out: Tensor, batch: int = 2048) -> dict[str, float]:
    """FVU, L0 and features that never fire, on the held-out rows."""
    error, fired, active = 0.0, torch.zeros(0, dtype=torch.bool), 0
    for x in held_out.split(batch):
        x_hat, features = reconstruct(x)
        error += float((x - x_hat).double().square().sum())
        active += int((features > 0).sum())
        now = (features > 0).any(0).cpu()
        fired = now if not len(fired) else fired | now
    total = float((held_out - held_out.mean(0)).double().square().sum())
    return {"fvu": error / total, "l0": active / len(held_out), "never_fired": int((~fired).sum())}


def main() -> None:
    toolkit, architecture, path, d_sae, k, steps, batch, seed, coefficient, device = sys.argv[1:]
    data = {name: x.to(device) for name, x in torch.load(path, weights_only=True, mmap=True).items()}
    task = Task(
        architecture, data["train"], data["held_out"], int(d_sae), int(k), int(steps), int(batch), int(seed),
        None if coefficient == "default" else float(coefficient), device,
    )  # fmt: skip
    function, package = TOOLKITS[toolkit]
    start = time.perf_counter()
    rules = function(task)
    if device != "cpu":
        torch.cuda.synchronize()
    result = {
        "seconds": time.perf_counter() - start,
        "version": importlib.metadata.version(package),
        **score(rules[""], task.held_out),
        "other_rules": {name: score(rule, task.held_out) for name, rule in rules.items() if name},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
