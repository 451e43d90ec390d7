"""Rewrites a dictionary's weights for inputs or features in other units, without a change of its reconstructions."""

from __future__ import annotations

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.dictionary.sites import geometric_mean, site_norms
from sae.dictionary.traits import Traits


class Rescalable(Traits, nn.Module):
    """The parameters of a dictionary (see `Dictionary`), and what rewrites them."""

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    W_skip: nn.Parameter | None

    @property
    @abstractmethod
    def centre(self) -> Float[Tensor, " d_in"]:
        """What is subtracted before encoding: b_dec, or 0 of a transcoder."""

    @property
    @abstractmethod
    def site_widths(self) -> tuple[int, ...]:
        """The width of each site of a crosscoder; empty if it is none."""

    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        """‖W_dec,j‖ of each feature j; of a crosscoder, Σ_s ‖W_dec,s,j‖ over its sites s."""
        if not self.site_widths:
            return self.W_dec.norm(dim=-1)
        return site_norms(self.W_dec, self.site_widths).sum(-1)

    @torch.no_grad()
    def fold_normalisation_(
        self,
        mean: Float[Tensor, " d_in"],
        scale: float | Float[Tensor, " d_in"],
        target_mean: Float[Tensor, " d_out"] | None = None,
        target_scale: float | None = None,
    ) -> None:
        """Rewrite weights trained on (x − mean)·scale so that they take raw x and reconstruct raw targets.

        Decoder rows keep their norm, so activations are in the units of the target: divided by its scale.

        With a scale for each number of a row, which a crosscoder has, activations are divided by their geometric mean,
        and decoder rows of sites with larger activations become longer than others.

        Args:
            mean, scale: normalisation of the input.
            target_mean, target_scale: normalisation of the target, if it is not the input; for all transcoders.
        """
        if isinstance(scale, Tensor):
            assert target_mean is None, "only crosscoders have a scale for each number, and they have no target"
            unit = geometric_mean(scale)
            self.W_enc.mul_((scale / unit)[:, None])
            self.W_dec.div_(scale / unit)
            self.scale_activations_(1 / unit)
            self.b_dec.copy_(self.b_dec / scale + mean)
            return
        target_scale = scale if target_scale is None else target_scale
        if target_mean is None:
            self.scale_activations_(1 / target_scale)
            self.b_dec.copy_(self.b_dec / target_scale + mean)
            return
        self.W_enc.mul_(scale)
        self.shift_pre_activations_(-(self.centre + mean * scale) @ self.W_enc / scale)
        self.scale_activations_(1 / target_scale)
        self.W_enc.mul_(1 / target_scale)
        self.b_dec.copy_(self.b_dec / target_scale + target_mean)
        if self.W_skip is not None:
            self.W_skip.mul_(scale / target_scale)
            self.b_dec.sub_(mean @ self.W_skip)
        self.shift_pre_activations_(self.centre @ self.W_enc)

    @torch.no_grad()
    def normalise_decoder_(self) -> None:
        """Scale decoder rows to norm 1; activations take over the norms. In a crosscoder, the norms of the sites in a
        row then add up to 1.

        Reconstructions do not change if each feature fires independently. If features are compared with each other or
        with a shared threshold (TopK, BatchTopK, Matryoshka), others may fire.
        """
        norms = self.decoder_norms()
        norms = norms.where(norms > 0, 1.0)
        self.W_dec.div_(norms[:, None])
        self.W_enc.mul_(norms)
        self.scale_activations_(norms)

    @torch.no_grad()
    def fire_above_(self, bound: Float[Tensor, ""]) -> None:
        """Raise what a feature needs to fire: lower the biases by `bound`, or set a threshold to it if there is one."""
        self.b_enc.sub_(bound)

    @torch.no_grad()
    def shift_pre_activations_(self, shift: Float[Tensor, " d_sae"]) -> None:
        """Add a shift to (x − b_dec) W_enc, wherever it is used."""
        self.b_enc.add_(shift)

    @torch.no_grad()
    def scale_activations_(self, factor: float | Float[Tensor, " d_sae"]) -> None:
        """Multiply all parameters in the units of pre-activations by a factor.

        The encoder is not changed.
        """
        for name in self.bias_names:
            self.get_parameter(name).mul_(factor)
