"""Formulas of other packages, by name, for comparison with numbers published with them. They are not our metrics.

Ours are in `metrics.py`. These follow SAELens 6.54.12 (`sae_lens/evals.py`) and SAEBench 0.6.0
(`sae_bench/evals/core/main.py`) term by term, flaws included: on the tokens that those packages keep, in batches of
whole contexts, since averages over batches depend on their size. `scripts/legacy_reference.py` runs the packages' own
functions to get the values that the tests compare with.

x_t is an activation, x̂_t its reconstruction, f_t its features; batch b has n_b tokens, all batches together N.
Everything is summed in float64, while the packages use float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae.dictionary.codes import Codes
from sae.results.estimate import double

CONTEXTS_PER_BATCH = 16
"""The default of both packages (`batch_size_prompts`)."""
SAELENS, SAEBENCH = "sae-lens 6.54.12", "sae-bench 0.6.0"


@dataclass(frozen=True)
class Batches:
    """Sums over the tokens of each batch, which the formulas are computed from.

    Attributes:
        tokens: n_b.
        error: Σ‖x − x̂‖².
        power: Σ‖x‖²; power_hat: Σ‖x̂‖²; product: Σ x·x̂.
        norm: Σ‖x‖; norm_hat: Σ‖x̂‖; norm_ratio: Σ ‖x̂‖/‖x‖, with 1 for a ‖x‖ below 10⁻⁴.
        cosine: Σ cos(x, x̂); not a number if one of them is 0.
        explained: Σ (1 − ‖x − x̂‖² / ‖x − x̄_b‖²), with x̄_b the mean of the batch.
        l0: Σ nonzero features; l1: Σ|f|; signed_l1: Σ f.
        total: Σ x over all batches.
    """

    tokens: Float[Tensor, " batches"]
    error: Float[Tensor, " batches"]
    power: Float[Tensor, " batches"]
    power_hat: Float[Tensor, " batches"]
    product: Float[Tensor, " batches"]
    norm: Float[Tensor, " batches"]
    norm_hat: Float[Tensor, " batches"]
    norm_ratio: Float[Tensor, " batches"]
    cosine: Float[Tensor, " batches"]
    explained: Float[Tensor, " batches"]
    l0: Float[Tensor, " batches"]
    l1: Float[Tensor, " batches"]
    signed_l1: Float[Tensor, " batches"]
    total: Float[Tensor, " d_in"]


class BatchSums:
    """Accumulates sums into `Batches`.

    Args:
        d_in: width of the activations.
    """

    def __init__(self, d_in: int) -> None:
        self._total = torch.zeros(d_in, dtype=torch.float64)
        self._rows: list[Tensor] = []

    def add_(self, x: Float[Tensor, "rows d_in"], x_hat: Float[Tensor, "rows d_in"], codes: Codes | None) -> None:
        """Add a batch."""
        x, x_hat = double(x).cpu(), double(x_hat).cpu()
        values = torch.zeros(len(x), 1) if codes is None else codes.values.cpu()
        error, norm, norm_hat = (x - x_hat).square().sum(-1), x.norm(dim=-1), x_hat.norm(dim=-1)
        product = (x * x_hat).sum(-1)
        columns = [
            torch.ones_like(error), error, norm.square(), norm_hat.square(), product, norm, norm_hat,
            norm_hat / norm.where(norm >= 1e-4, 1.0), product / (norm * norm_hat),
            1 - error / (x - x.mean(0)).square().sum(-1),
            (values != 0).sum(-1), values.double().abs().sum(-1), values.double().sum(-1),
        ]  # fmt: skip
        self._rows.append(torch.stack([column.double().sum() for column in columns]))
        self._total += x.sum(0)

    def state_dict(self) -> dict[str, Tensor]:
        """The sums, for `load_state_dict`."""
        return {"total": self._total, **({"rows": torch.stack(self._rows)} if self._rows else {})}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from sums of the same width."""
        self._total = state["total"].clone()
        self._rows = list(state["rows"].unbind(0)) if "rows" in state else []

    def batches(self) -> Batches:
        """The sums of everything added."""
        return Batches(*torch.stack(self._rows).unbind(1), total=self._total)


@dataclass(frozen=True)
class PublishedLosses:
    """Means over the tokens that a package keeps, in nats: next-token cross-entropy, and KL from the clean model.

    The loss of token t + 1 counts if token t is kept; the divergence counts at every kept position, including the last
    of a context. Ours counts both if token t is kept and has a next one, and keeps fewer tokens.
    """

    ce_with_sae: float
    ce_without_sae: float
    ce_with_ablation: float
    kl_with_sae: float
    kl_with_ablation: float


def explained_variance(b: Batches) -> float:
    """1 − (Σ‖x − x̂‖²/N) / (Σ‖x‖²/N − ‖Σx/N‖²): SAELens 6.54.12, `ExplainedVarianceCalculator`.

    The same as ours, 1 − fvu, on other tokens. Earlier releases of SAELens used SAEBench's.
    """
    tokens = b.tokens.sum()
    variance = float(b.power.sum() / tokens - (b.total / tokens).square().sum())
    mse = float(b.error.sum() / tokens)
    if variance < 1e-10:
        return 1.0 if mse < 1e-10 else 0.0
    return 1 - mse / variance


def explained_variance_saebench(b: Batches) -> float:
    """1 − R / (S − m²): SAEBench 0.6.0. R and S are means over batches of the batches' means of ‖x − x̂‖² and ‖x‖²,
    and m, which should be the mean activation, is the mean over batches and dimensions of E[x_j²].

    m² takes the place of ‖E x‖², has other units, and changes with the scale of x: the score of a mean predictor
    depends on ‖E x‖² and m², and is not 0 (0.35 on the activations of the tests). Batches count equally, however many
    tokens they keep.
    """
    residual, power = (b.error / b.tokens).mean(), (b.power / b.tokens).mean()
    return float(1 - residual / (power - (power / len(b.total)).square()))


def explained_variance_legacy(b: Batches) -> float:
    """Σ_t (1 − ‖x_t − x̂_t‖² / ‖x_t − x̄_b‖²) / N: both packages, which call it old and incorrect.

    A mean of ratios, while ours is a ratio of means: tokens near the mean of their batch dominate it, and it depends on
    the batch.
    """
    return float(b.explained.sum() / b.tokens.sum())


def mse(b: Batches) -> float:
    """Σ‖x − x̂‖²/N: SAELens 6.54.12. The same as ours, on other tokens."""
    return float(b.error.sum() / b.tokens.sum())


def mse_saebench(b: Batches) -> float:
    """Σ_b (Σ_{t in b} ‖x_t − x̂_t‖² / n_b) / N: SAEBench 0.6.0.

    It is divided by the number of tokens twice: doubling the batch size halves it.
    """
    return float((b.error / b.tokens).sum() / b.tokens.sum())


def cossim(b: Batches) -> float:
    """Σ cos(x, x̂)/N: both packages. Not a number if one x̂ is 0, which ours counts as a cosine of 0."""
    return float(b.cosine.sum() / b.tokens.sum())


def l2_norm_in(b: Batches) -> float:
    """Σ‖x‖/N: both packages."""
    return float(b.norm.sum() / b.tokens.sum())


def l2_norm_out(b: Batches) -> float:
    """Σ‖x̂‖/N: both packages."""
    return float(b.norm_hat.sum() / b.tokens.sum())


def l2_ratio(b: Batches) -> float:
    """Σ(‖x̂‖/‖x‖)/N, with 1 for a ‖x‖ below 10⁻⁴: both packages. Ours leaves tokens of ‖x‖ = 0 out."""
    return float(b.norm_ratio.sum() / b.tokens.sum())


def relative_reconstruction_bias(b: Batches) -> float:
    """mean over batches of Σ‖x̂‖² / Σ x·x̂: both packages. Ours is one ratio of sums over everything."""
    return float((b.power_hat / b.product).mean())


def l0(b: Batches) -> float:
    """Σ (nonzero features)/N: both packages. The same as ours, on other tokens."""
    return float(b.l0.sum() / b.tokens.sum())


def l1(b: Batches) -> float:
    """Σ|f|/N: SAELens 6.54.12. The same as ours, on other tokens."""
    return float(b.l1.sum() / b.tokens.sum())


def l1_saebench(b: Batches) -> float:
    """Σ f/N, without the absolute value: SAEBench 0.6.0. The same if features are never negative."""
    return float(b.signed_l1.sum() / b.tokens.sum())


def ce_loss_score(losses: PublishedLosses) -> float:
    """(CE ablated − CE with x̂) / (CE ablated − CE clean): both packages.

    Zero ablation replaces every position, special tokens included, while SAELens puts x̂ at the others only: against
    such a destructive ablation, anything scores near 1. Ours, `ce_recovered_zero`, replaces the same positions in both.
    """
    ablated = losses.ce_with_ablation
    return _divided(ablated - losses.ce_with_sae, ablated - losses.ce_without_sae)


def kl_div_score(losses: PublishedLosses) -> float:
    """(KL ablated − KL with x̂) / KL ablated: both packages. Ours is the divergence itself, `kl`.

    SAEBench takes logarithms of probabilities: one that underflows in float32 makes its divergence not a number.
    """
    return _divided(losses.kl_with_ablation - losses.kl_with_sae, losses.kl_with_ablation)


OfActivations = Mapping[str, Callable[[Batches], float]]
_COMMON: OfActivations = {
    "explained_variance_legacy": explained_variance_legacy, "cossim": cossim, "l2_norm_in": l2_norm_in,
    "l2_norm_out": l2_norm_out, "l2_ratio": l2_ratio, "relative_reconstruction_bias": relative_reconstruction_bias,
    "l0": l0,
}  # fmt: skip
OF_ACTIVATIONS: Mapping[str, OfActivations] = {
    SAELENS: {"explained_variance": explained_variance, "mse": mse, **_COMMON, "l1": l1},
    SAEBENCH: {"explained_variance": explained_variance_saebench, "mse": mse_saebench, **_COMMON, "l1": l1_saebench},
}
"""Formulas by package and by the metric's name there."""
OF_LOSSES: Mapping[str, Callable[[PublishedLosses], float]] = {
    "ce_loss_with_sae": lambda losses: losses.ce_with_sae,
    "ce_loss_without_sae": lambda losses: losses.ce_without_sae,
    "ce_loss_with_ablation": lambda losses: losses.ce_with_ablation,
    "ce_loss_score": ce_loss_score,
    "kl_div_with_sae": lambda losses: losses.kl_with_sae,
    "kl_div_with_ablation": lambda losses: losses.kl_with_ablation,
    "kl_div_score": kl_div_score,
}
"""Formulas by the metric's name in both packages, which differ in the positions where they put x̂."""
REGISTRY: Mapping[str, tuple[str, ...]] = {
    "l0": ("l0",),
    "variance_explained": ("explained_variance", "explained_variance_legacy"),
}
"""SAELens's formulas of the numbers in its registry of dictionaries. Which release made one is not recorded, and
`explained_variance` has changed between them, so both are shown."""


def of_activations(package: str, batches: Batches) -> dict[str, float | None]:
    """The metrics of activations by a package's formulas; None if a formula gives no number."""
    return {name: _finite(formula(batches)) for name, formula in OF_ACTIVATIONS[package].items()}


def of_losses(losses: PublishedLosses) -> dict[str, float | None]:
    """The metrics of losses; None if a formula gives no number."""
    return {name: _finite(formula(losses)) for name, formula in OF_LOSSES.items()}


def _divided(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
