"""A training step written densely: plain autograd, torch's Adam, projection, unit rows. Slow and obvious."""

from __future__ import annotations

import torch
from torch import Tensor

from sae.config.settings import TrainConfig
from sae.dictionary.base import Dictionary


def dense_features(architecture: str, pre: Tensor, k: int) -> Tensor:
    """What fires in TopK, BatchTopK and ReLU, written with dense masks."""
    if architecture == "topk":
        return pre.relu() * torch.zeros_like(pre).scatter(1, pre.topk(k, dim=1).indices, 1.0)
    if architecture in ("batch_topk", "matryoshka"):
        bound = pre.flatten().topk(k * len(pre)).values[-1]
        return pre.relu() * (pre >= bound)
    return pre.relu()


class DenseReference:
    """Dense autograd and plain PyTorch, for all architectures; dead features are revived.

    With a target it is that of a transcoder, from whose input nothing is subtracted, and whose target loses x W_skip.
    In a crosscoder, sums of the norms of all sites take the place of norms.
    """

    def __init__(self, architecture: str, dictionary: Dictionary, settings: TrainConfig) -> None:
        self.architecture, self.dictionary, self.settings = architecture, dictionary, settings
        trained = {name: p for name, p in dictionary.named_parameters() if p.requires_grad}
        thresholds = [p for name, p in trained.items() if name == "threshold"]
        others = [p for name, p in trained.items() if name != "threshold"]
        groups = [{"params": others}, *({"params": [p]} for p in thresholds)]
        self.adam = torch.optim.Adam(groups, betas=(settings.beta1, settings.beta2))
        self.norms: list[float] = []
        self.silent = torch.zeros(dictionary.d_sae, dtype=torch.int64)

    def loss(self, x: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What is minimised, the error, and the features."""
        d, dead = self.dictionary, self.silent >= self.settings.dead_after_tokens
        inputs, y = (x - d.b_dec, x) if target is None else (x, target)
        if d.W_skip is not None:
            y = y - x @ d.W_skip
        pre = inputs @ d.W_enc + d.b_enc
        loss, mse, features, error = self.losses(inputs, y, pre)
        if dead.any() and self.architecture in ("relu", "gated"):
            loss = loss - self.settings.aux_coefficient * (d.b_enc * dead).sum()
        if dead.any() and self.architecture != "relu":
            k_aux = d.d_in // 2
            worth = pre
            if self.architecture == "gated":
                worth = (inputs @ d.W_enc) * d.r_mag.exp() + d.b_mag
            among = worth.masked_fill(~dead, -torch.inf)
            chosen = torch.zeros_like(pre).scatter(1, among.topk(min(k_aux, int(dead.sum())), dim=1).indices, 1.0)
            guess = (worth.relu() * chosen * dead) @ d.W_dec
            share = min(1.0, float(dead.sum()) / k_aux)
            loss = loss + self.settings.aux_coefficient * share * (error.detach() - guess).square().sum(1).mean()
        return loss, mse, features

    def step(self, x: Tensor, rate: float, target: Tensor | None = None) -> float:
        d = self.dictionary
        loss, mse, features = self.loss(x, target)
        self.adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            if d.unit_decoder:
                normal = self.normal()
                d.W_dec.grad -= (d.W_dec.grad * normal).sum(1, keepdim=True) * normal
            if self.settings.max_gradient_norm is not None:
                trained = [p.grad for group in self.adam.param_groups for p in group["params"]]
                self.norms.append(float(torch.cat([gradient.flatten() for gradient in trained]).norm()))
                for gradient in trained:
                    gradient.mul_(min(1.0, self.settings.max_gradient_norm / self.norms[-1]))
            for group, factor in zip(self.adam.param_groups, (1, 10), strict=False):
                group["lr"] = factor * rate
            self.adam.step()
            if d.unit_decoder:
                d.W_dec /= self.row_norms()[:, None]
            if self.architecture == "jumprelu":
                d.get_parameter("threshold").clamp_(min=0)
            self.silent = (self.silent + len(x)).masked_fill((features > 0).any(0), 0)
        return float(mse.detach())

    def row_norms(self) -> Tensor:
        """Norms of the decoder's rows."""
        sites = self.dictionary.site_widths or (self.dictionary.d_out,)
        return torch.stack([part.norm(dim=1) for part in self.dictionary.W_dec.split(sites, dim=1)]).sum(0)

    def normal(self) -> Tensor:
        """The unit direction in which the norm of each row grows fastest: of one site, the row itself."""
        sites = self.dictionary.site_widths
        if not sites:
            return self.dictionary.W_dec
        parts = [part / part.norm(dim=1, keepdim=True) for part in self.dictionary.W_dec.split(sites, dim=1)]
        normal = torch.cat(parts, dim=1).nan_to_num(0.0)
        return normal / normal.norm(dim=1, keepdim=True)

    def losses(self, inputs: Tensor, y: Tensor, pre: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is minimised but for AuxK, the error, the features, and what is left of y."""
        d, settings = self.dictionary, self.settings
        if self.architecture == "gated":
            gate = pre.relu()
            magnitude = ((inputs @ d.W_enc) * d.r_mag.exp() + d.b_mag).relu()
            features = magnitude * (pre > 0)
            error = y - features @ d.W_dec - d.b_dec
            of_gate = y.detach() - gate @ d.W_dec.detach() - d.b_dec.detach()
            mse = error.square().sum(1).mean()
            penalty = settings.l1_coefficient * gate.sum(1).mean()
            return mse + penalty + of_gate.square().sum(1).mean(), mse, features, error
        if self.architecture == "jumprelu":
            features, count = straight_through(pre.relu(), d.get_parameter("threshold"), settings.bandwidth)
            error = y - features @ d.W_dec - d.b_dec
            mse = error.square().sum(1).mean()
            return mse + settings.l0_coefficient * count.sum(1).mean(), mse, features, error
        features = dense_features(self.architecture, pre, d.settings().get("k", 0))
        error = y - features @ d.W_dec - d.b_dec
        mse = error.square().sum(1).mean()
        if self.architecture == "relu":
            return mse + settings.l1_coefficient * (features @ self.row_norms()).mean(), mse, features, error
        if self.architecture == "matryoshka":
            of_prefixes = [(y - features[:, :m] @ d.W_dec[:m] - d.b_dec).square().sum(1).mean() for m in d.prefix_sizes]
            return torch.stack(of_prefixes).mean(), mse, features, error
        return mse, mse, features, error


def straight_through(z: Tensor, threshold: Tensor, width: float) -> tuple[Tensor, Tensor]:
    """z · [z > θ] and [z > θ], whose gradients to θ come from terms that are 0 but for what autograd makes of them."""
    open_ = (z > threshold).to(z.dtype)
    near = (((z - threshold).abs() < width / 2) & (z > 0)).to(z.dtype)
    nothing = threshold - threshold.detach()
    return z * open_ - near * (threshold.detach() / width) * nothing, open_ - near / width * nothing
