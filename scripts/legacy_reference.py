"""Runs SAELens's and SAEBench's evaluations on the tensors of tests/support/published_case.py, and prints the results.

    python -m venv ENV
    ENV/bin/pip install sae-lens==6.54.12 tabulate
    ENV/bin/pip install --no-deps sae-bench==0.6.0
    ENV/bin/python scripts/legacy_reference.py

In an environment of its own: sae-lens needs transformer-lens < 4. The packages' own functions compute everything; what
they ask of a model, a store of tokens and a dictionary is answered by the stand-ins below, from the same tensors.
tests/evaluation/test_published.py holds what this prints.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from sae_bench.evals.core import main as sae_bench  # pyright: ignore[reportMissingImports]
from sae_lens import evals as sae_lens  # pyright: ignore[reportMissingImports]
from sae_lens.training.activation_scaler import ActivationScaler  # pyright: ignore[reportMissingImports]

from tests.support import published_case as case  # pyright: ignore[reportMissingImports]

BATCH = 16
BATCHES = -(-case.CONTEXTS // BATCH)


class Model:
    """What both evaluations call of a transformer-lens model, for the toy model."""

    def __call__(self, tokens: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.run_with_hooks(tokens, fwd_hooks=[])

    def run_with_hooks(self, tokens: torch.Tensor, *, fwd_hooks: Any, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x = case.residual(tokens)
        for _, function in fwd_hooks:
            x = function(x, hook=None)
        logits = case.logits(x)
        loss = -logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        return logits, loss

    def run_with_cache(self, tokens: torch.Tensor, **_: Any) -> tuple[None, dict[str, torch.Tensor]]:
        return None, {case.HOOK: case.residual(tokens)}


class Store:
    """Batches of contexts, in order."""

    def __init__(self) -> None:
        self.batches = iter(case.TOKENS.split(BATCH))

    def get_batch_tokens(self, size: int) -> torch.Tensor:
        assert size == BATCH
        return next(self.batches)


def dictionary(decode: Any) -> Any:
    """What both evaluations read of a dictionary."""
    metadata = SimpleNamespace(hook_name=case.HOOK, hook_head_index=None)
    cfg = SimpleNamespace(metadata=metadata, hook_name=case.HOOK, hook_head_index=None, hook_layer=1, d_sae=case.D_SAE)
    return SimpleNamespace(cfg=cfg, device=torch.device("cpu"), encode=case.encode, decode=decode)


def evaluate(package: Any, decode: Any) -> dict[str, float]:
    """A package's numbers, special tokens excluded as it does by itself."""
    scaler = {"activation_scaler": ActivationScaler()} if package is sae_lens else {}
    ignore = [case.SPECIAL] if package is sae_lens else {case.SPECIAL}
    shared = {"n_batches": BATCHES, "eval_batch_size_prompts": BATCH, "ignore_tokens": ignore, **scaler}
    metrics, _ = package.get_sparsity_and_variance_metrics(
        dictionary(decode), Model(), Store(), compute_l2_norms=True, compute_sparsity_metrics=True,
        compute_variance_metrics=True, compute_featurewise_density_statistics=False, model_kwargs={}, **shared,
    )  # fmt: skip
    losses = package.get_downstream_reconstruction_metrics(
        dictionary(decode), Model(), Store(), compute_kl=True, compute_ce_loss=True, **shared
    )
    return {**metrics, **losses}


def main() -> None:
    mean = case.mean()
    decoders = {"dictionary": case.decode, "mean predictor": lambda features: mean.expand(*features.shape[:-1], -1)}
    with torch.no_grad():
        values = {
            name: {what: evaluate(package, decode) for what, decode in decoders.items()}
            for name, package in (("sae-lens 6.54.12", sae_lens), ("sae-bench 0.6.0", sae_bench))
        }
    print(json.dumps(values, indent=4))


if __name__ == "__main__":
    main()
