"""The logit effect of directions of the residual stream: the final norm's gain and the unembedding in one matrix."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def unembedding_of(bridge: Any, d_model: int, device: torch.device) -> Float[Tensor, "d_model vocab"]:
    """As `HookedModel.unembedding`, of a transformer-lens bridge."""
    norm = getattr(bridge, "ln_final", None)
    W_U = bridge.W_U.detach().float().to(device)
    if W_U.shape[0] != d_model:  # the embedding's width differs from the residual stream's, as in OPT-350M
        project_out = bridge.original_model.get_decoder().project_out.weight.detach().float()
        W_U = project_out.T.to(W_U.device) @ W_U
    if norm is None:
        return W_U
    weight = getattr(norm, "weight", None)
    if weight is not None:
        # Gemma's RMSNorm multiplies by 1 + weight.
        offset = float(getattr(norm, "uses_weight_offset", bridge.cfg.rmsnorm_uses_offset))
        W_U = (offset + weight.detach().float())[:, None].to(W_U.device) * W_U
    if not bridge.cfg.uses_rms_norm:
        W_U = W_U - W_U.mean(0, keepdim=True)
    return W_U
