"""Weights for dictionaries in other toolkits' files, and the parts that the toolkits' formulas share."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

D_IN, D_SAE, K = 6, 20, 3
D_OUT = 4
"""Width of the output of transcoders that give another width than they take."""
Forward = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From activations to features, in the file's own units, and reconstructions."""


@dataclass
class Case:
    """A dictionary in another toolkit's files.

    Attributes:
        write: writes the files into a folder, and returns what is to be loaded.
        forward: its toolkit's formula.
        exact_features: whether features are the same numbers here; otherwise decoder norms are folded.
        metadata: what is to be known of it.
    """

    write: Callable[[Path], Path]
    forward: Forward
    exact_features: bool = True
    metadata: dict[str, Any] = field(default_factory=dict)


def weights(seed: int = 5, *, unit: bool = True, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Random weights in the orientation x @ W_enc, f @ W_dec."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    W_dec = draw(D_SAE, D_IN)
    W_dec /= W_dec.norm(dim=-1, keepdim=True)
    if not unit:
        W_dec *= 0.5 + torch.rand(D_SAE, 1, generator=generator, dtype=torch.float64) * 2
    parts = {
        "W_enc": draw(D_IN, D_SAE), "b_enc": 0.3 * draw(D_SAE), "W_dec": W_dec, "b_dec": draw(D_IN),
        "threshold": draw(D_SAE).abs(), "b_gate": draw(D_SAE), "b_mag": draw(D_SAE), "r_mag": 0.3 * draw(D_SAE),
        "W_skip": 0.5 * draw(D_IN, D_IN),
    }  # fmt: skip
    return {name: x.to(dtype) for name, x in parts.items()}


def narrow(w: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with an output of D_OUT numbers, and decoder rows of norm 1."""
    W_dec = w["W_dec"][:, :D_OUT]
    skip = w["W_skip"][:D_OUT]
    return {**w, "W_dec": W_dec / W_dec.norm(dim=-1, keepdim=True), "b_dec": w["b_dec"][:D_OUT], "W_skip": skip}


def layer_normed(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The input as SAELens and OpenAI normalise it, and what its reconstruction is multiplied by and added to."""
    mean = x.mean(-1, keepdim=True)
    std = (((x - mean) ** 2).sum(-1, keepdim=True) / (x.shape[-1] - 1)).sqrt()
    return (x - mean) / (std + 1e-5), std, mean


def largest(h: Tensor, k: int, ranks: Tensor | None = None) -> Tensor:
    """h where it is among the k of the largest rank, elsewhere 0."""
    chosen = (h if ranks is None else ranks).topk(k, dim=-1).indices
    return torch.zeros_like(h).scatter(-1, chosen, h.gather(-1, chosen))


def pursuit(row: Tensor, W_dec: Tensor, threshold: float, steps: int, stops: bool = True) -> Tensor:
    """Matching pursuit of one input, feature by feature."""
    f = torch.zeros(len(W_dec), dtype=row.dtype)
    for _ in range(steps):
        before = f != 0
        products = [float(row @ direction) for direction in W_dec]
        best = max(range(len(products)), key=products.__getitem__)
        amount = max(products[best], 0.0)
        f[best] += amount
        row = row - amount * W_dec[best]
        if (stops and bool(((f != 0) == before).all())) or (threshold > 0 and float(row.norm()) < threshold):
            break
    return f


def save_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: x.contiguous() for name, x in tensors.items()}, path)


def save_pickle(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: x.contiguous() if isinstance(x, Tensor) else x for name, x in content.items()}, path)
