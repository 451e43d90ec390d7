"""The direct effect of a residual-stream change on the next token: final norm, unembedding, softmax; no blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.model.language_model import LanguageModel
from sae.model.tail import Readout
from sae.results.estimate import double, row_sums

_ROUNDING = 0.05


@dataclass(frozen=True)
class DirectChange:
    """First-order changes of next-token log-probabilities, float64.

    Attributes:
        log_probability: Δ log p of the requested token.
        mean_logit: Σ_u p_u Δℓ_u, which is subtracted for this and every other token.
    """

    log_probability: Float[Tensor, " rows"]
    mean_logit: Float[Tensor, " rows"]


@dataclass(frozen=True)
class DirectPath:
    """The final norm, linearised at the model's residual, and the unembedding.

    Let r be the residual that enters the norm, ε the norm's epsilon, c(v) = v − mean(v) if the norm centres and v
    otherwise, σ² = mean(c(r)²) + ε and n = c(r)/σ. A change δ of r changes the normed residual to first order by

        J δ = (c(δ) − n · mean(n ⊙ δ)) / σ,

    where the second term comes from the scale σ itself. Logits change by Jδ through the norm's gain and the
    unembedding. The log-probability of token v changes by its logit's change minus the mean change under the model's
    own probabilities p:

        Δ log p_v = Δℓ_v − Σ_u p_u Δℓ_u.

    This is the gradient of log p along the paths from the hook point that bypass all blocks: the "direct logit
    attribution" of Elhage et al. 2021 ("A Mathematical Framework for Transformer Circuits"), with softmax and scale.

    Attributes:
        W_U: the unembedding with gain and centring folded in, as returned by `LanguageModel.unembedding`.
        centres: whether the norm subtracts the mean.
        epsilon: the norm's ε.
    """

    W_U: Float[Tensor, "d_model vocab"]
    centres: bool
    epsilon: float

    @staticmethod
    def of(language_model: LanguageModel, hook: str) -> DirectPath | None:
        """The direct path, or None if the hook point is not in the residual stream or logits are capped or scaled.

        Two tokens are run to check that norm and unembedding alone produce the logits, whatever the model family.
        """
        cfg = language_model.bridge.cfg
        cap = getattr(cfg, "output_logits_soft_cap", None)
        if not language_model.is_residual(hook) or (cap is not None and cap > 0):
            return None
        path = DirectPath(language_model.unembedding(), not cfg.uses_rms_norm, float(cfg.eps))
        two = torch.tensor([[0, 1]], device=language_model.device)
        tail = language_model.tail(hook)
        start = tail.start(two)
        return path if path.gives(tail.read_out(start, tail.activations(start), two)) else None

    def gives(self, readout: Readout) -> bool:
        """Whether the logits of the first two positions differ as their normed residuals do through W_U.

        A bias cancels in the difference.
        """
        final, logits = readout.final[0, :2], readout.logits[0, :2]
        if final.shape[-1] != self.W_U.shape[0]:
            return False
        normed, _ = self._normed(final)
        expected, actual = (pair[0] - pair[1] for pair in (normed @ self.W_U, logits))
        return bool((actual - expected).norm() <= _ROUNDING * actual.norm())

    def through_norm(
        self, final: Float[Tensor, "rows d_model"], change: Float[Tensor, "rows d_model"]
    ) -> Float[Tensor, "rows d_model"]:
        """Jδ for each row of residuals and changes."""
        if self.centres:
            change = change - change.mean(-1, keepdim=True)
        normed, sigma = self._normed(final)
        return (change - normed * (normed * change).mean(-1, keepdim=True)) / sigma

    def _normed(
        self, final: Float[Tensor, "rows d_model"]
    ) -> tuple[Float[Tensor, "rows d_model"], Float[Tensor, "rows 1"]]:
        """n and σ."""
        if self.centres:
            final = final - final.mean(-1, keepdim=True)
        sigma = (final.square().mean(-1, keepdim=True) + self.epsilon).sqrt()
        return final / sigma, sigma

    def log_probability(
        self,
        normed_change: Float[Tensor, "rows d_model"],
        log_p: Float[Tensor, "rows vocab"],
        token: Int[Tensor, " rows"],
    ) -> DirectChange:
        """Change of one token's log-probability under a change of the normed residual.

        Args:
            normed_change: Jδ.
            log_p: the model's own next-token log-probabilities.
            token: the token whose log-probability is returned.
        """
        logits = normed_change @ self.W_U
        mean = row_sums(log_p.exp() * logits)
        return DirectChange(double(logits.gather(1, token[:, None])[:, 0]) - mean, mean)
