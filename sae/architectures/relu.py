"""ReLU: every positive pre-activation fires; an L1 penalty in training keeps codes sparse."""

from __future__ import annotations

from sae.architectures.elementwise import Elementwise


class ReLU(Elementwise):
    """f = ReLU((x − b_dec) W_enc + b_enc),  x̂ = f W_dec + b_dec.

    Bricken et al. 2023, "Towards Monosemanticity: Decomposing Language Models With Dictionary Learning"; in the form of
    Anthropic's April 2024 update: decoder norms are free during training, and the penalty includes them.
    """

    architecture = "relu"
    saebench_name = "standard_april_update"
    unit_decoder = False
    penalty = "l1"
    falling_l0 = True
    reads = ("train.l1_coefficient", "train.sparsity_warmup_fraction")
