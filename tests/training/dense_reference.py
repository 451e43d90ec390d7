"""A training step written densely: plain autograd, torch's Adam, projection, unit rows. Slow and obvious."""

from __future__ import annotations

import torch
from torch import Tensor

from sae.config import TrainConfig
from sae.dictionary import Dictionary


def dense_features(architecture: str, pre: Tensor, k: int) -> Tensor:
    """What fires, written with dense masks."""
    if architecture == "topk":
        return pre.relu() * torch.zeros_like(pre).scatter(1, pre.topk(k, dim=1).indices, 1.0)
    if architecture == "batch_topk":
        bound = pre.flatten().topk(k * len(pre)).values[-1]
        return pre.relu() * (pre >= bound)
    return pre.relu()


class DenseReference:
    """Dense autograd and plain PyTorch, for all architectures; AuxK on the features that are dead."""

    def __init__(self, architecture: str, dictionary: Dictionary, settings: TrainConfig) -> None:
        self.architecture, self.dictionary, self.settings = architecture, dictionary, settings
        parameters = [p for p in dictionary.parameters() if p.requires_grad]
        self.adam = torch.optim.Adam(parameters, betas=(settings.beta1, settings.beta2))
        self.silent = torch.zeros(dictionary.d_sae, dtype=torch.int64)

    def step(self, x: Tensor, rate: float) -> float:
        d, dead = self.dictionary, self.silent >= self.settings.dead_after_tokens
        pre = (x - d.b_dec) @ d.W_enc + d.b_enc
        features = dense_features(self.architecture, pre, d.settings().get("k", 0))
        error = x - features @ d.W_dec - d.b_dec
        loss = mse = error.square().sum(1).mean()
        if self.architecture == "relu":
            loss = loss + self.settings.l1_coefficient * (features @ d.W_dec.norm(dim=1)).mean()
        elif dead.any():
            k_aux = d.d_in // 2
            among = pre.masked_fill(~dead, -torch.inf)
            chosen = torch.zeros_like(pre).scatter(1, among.topk(min(k_aux, int(dead.sum())), dim=1).indices, 1.0)
            guess = (pre.relu() * chosen * dead) @ d.W_dec
            share = min(1.0, float(dead.sum()) / k_aux)
            loss = loss + self.settings.aux_coefficient * share * (error.detach() - guess).square().sum(1).mean()
        self.adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            d.W_dec.grad -= (d.W_dec.grad * d.W_dec).sum(1, keepdim=True) * d.W_dec
            self.adam.param_groups[0]["lr"] = rate
            self.adam.step()
            d.W_dec /= d.W_dec.norm(dim=1, keepdim=True)
            self.silent = (self.silent + len(x)).masked_fill((features > 0).any(0), 0)
        return float(mse.detach())
