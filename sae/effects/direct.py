"""What a change of the residual stream does to the next token by itself: final norm, unembedding, softmax; no block."""

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
        log_probability: Δ log p of the token asked for.
        mean_logit: Σ_u p_u Δℓ_u, which is subtracted in it and in that of every other token.
    """

    log_probability: Float[Tensor, " rows"]
    mean_logit: Float[Tensor, " rows"]


@dataclass(frozen=True)
class DirectPath:
    """The final norm, linearised where the model is, and the unembedding.

    With r the residual that enters the norm, ε the norm's, c(v) = v − mean(v) where the norm centres and v where it
    does not, σ² = mean(c(r)²) + ε and n = c(r)/σ, a change δ of r changes the normed residual to first order by

        J δ = (c(δ) − n · mean(n ⊙ δ)) / σ,

    the second part being that of the scale σ itself. Logits change by Jδ through the norm's gain and the unembedding,
    and the log-probability of token v by that of its logit less the mean of all under the model's own probabilities p:

        Δ log p_v = Δℓ_v − Σ_u p_u Δℓ_u.

    It is the gradient of log p along those paths from the hook point that no block touches, the "direct logit
    attribution" of Elhage et al. 2021 ("A Mathematical Framework for Transformer Circuits"), with softmax and scale.

    Attributes:
        W_U: the unembedding with gain and centring in it, as `LanguageModel.unembedding` gives it.
        centres: whether the norm subtracts the mean.
        epsilon: the norm's ε.
    """

    W_U: Float[Tensor, "d_model vocab"]
    centres: bool
    epsilon: float

    @staticmethod
    def of(language_model: LanguageModel, hook: str) -> DirectPath | None:
        """None where a change at the hook point is no change of the residual stream, or logits are capped or scaled.

        Whether norm and unembedding are all that makes the logits is tried on two tokens, whatever the family.
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
        """Whether logits differ between the first two positions as the normed residual does through W_U.

        A bias is the same at both.
        """
        final, logits = readout.final[0, :2], readout.logits[0, :2]
        if final.shape[-1] != self.W_U.shape[0]:
            return False
        normed, _ = self._normed(final)
        expected, actual = (both[0] - both[1] for both in (normed @ self.W_U, logits))
        return bool((actual - expected).norm() <= _ROUNDING * actual.norm())

    def through_norm(
        self, final: Float[Tensor, "rows d_model"], change: Float[Tensor, "rows d_model"]
    ) -> Float[Tensor, "rows d_model"]:
        """Jδ for every row of residuals and changes."""
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
        """What a change of the normed residual makes of one token's log-probability.

        Args:
            normed_change: Jδ.
            log_p: the model's own next-token log-probabilities.
            token: whose log-probability is asked for.
        """
        logits = normed_change @ self.W_U
        mean = row_sums(log_p.exp() * logits)
        return DirectChange(double(logits.gather(1, token[:, None])[:, 0]) - mean, mean)
