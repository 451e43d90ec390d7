"""What the class of an architecture declares: its name, the settings it reads, and how it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal


class Traits:
    """Facts about an architecture as class attributes, so that no other code needs to know its name."""

    architecture: ClassVar[str]
    """The value of `dictionary.architecture`, and the name of the file in `sae/architectures/`."""
    saebench_name: ClassVar[str | None] = None
    """SAEBench's name of it; None: the same."""
    setting_names: ClassVar[tuple[str, ...]] = ()
    """Settings of `dictionary` that are constructor arguments, in addition to d_sae."""
    reads: ClassVar[tuple[str, ...]]
    """Settings that it reads and some other architecture does not, such as `train.k_aux`."""
    bias_names: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Bias parameters `[d_sae]`, in units of the pre-activations; they start at 0."""
    unit_decoder: ClassVar[bool] = True
    """Whether training keeps decoder rows at norm 1; otherwise they are normalised after training."""
    penalty: ClassVar[Literal["l1", "l0"] | None] = None
    """The penalty that keeps features from firing, with the weight `train.l1_coefficient` or `train.l0_coefficient`;
    None: a rule sets the number of features that fire."""
    falling_l0: ClassVar[bool] = False
    """Whether a penalty of adjusted weight starts from more than k features per token."""
    batch_threshold: ClassVar[bool] = False
    """Whether `threshold` is a single number that training sets so that k features fire per token."""
    rate_factors: ClassVar[Mapping[str, float]] = MappingProxyType({})
    """Factors of the learning rate by parameter; 1 for the others."""
    non_negative: ClassVar[tuple[str, ...]] = ()
    """Parameters that training keeps from falling below 0."""
