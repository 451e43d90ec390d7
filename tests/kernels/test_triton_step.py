"""Whole training steps with the Triton back end: the CPU's steps, and no tensor as large as they have no need of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

pytest.importorskip("triton")

from sae.architectures import ARCHITECTURES
from sae.dictionary.base import Dictionary
from sae.dictionary.frame import Frame
from sae.kernels import back_end, sparse
from sae.training import optimizer as optimizer_module
from sae.training.firing import FiringRecord
from sae.training.initialise import initialise_
from sae.training.objectives import OBJECTIVES, StepInputs
from sae.training.optimizer import FeatureAdam
from tests.support.kernel_cases import DEVICE


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch):
    """Makes everything compute with the back end of a name."""

    def choose(name: str) -> None:
        for module in (sparse, optimizer_module):
            monkeypatch.setattr(module, "kernels_for", lambda weights: back_end(name))

    return choose


@dataclass
class Trained:
    """A dictionary in training, without the loop around it."""

    architecture: str
    d_in: int
    d_sae: int
    batch: int
    dead_after: int
    device: str = "cpu"
    d_out: int | None = None
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.dictionary: Dictionary = ARCHITECTURES[self.architecture](self.d_in, self.d_sae, k=4)
        if self.d_out is not None:
            self.dictionary.set_frame(Frame(skip=True, d_out=self.d_out))
        self.dictionary.to(self.device)
        self.data = self.targets = torch.randn(4, self.batch, self.d_in, generator=generator).to(self.device)
        if self.d_out is not None:
            self.targets = torch.randn(4, self.batch, self.d_out, generator=generator).to(self.device)
        initialise_(self.dictionary, self.data[0], generator, self.targets[0])
        self.optimizer = FeatureAdam(self.dictionary, 0.9, 0.999)
        self.firing = FiringRecord(self.d_sae, self.dead_after, torch.device(self.device), refresh_every=1)

    def step(self, number: int) -> None:
        context = StepInputs(
            self.firing.dead, self.firing.candidates, 0.0, 1 / 32, self.d_in // 2, self.firing.density,
            self.optimizer.encoder_sink, self.optimizer.decoder_sink,
        )  # fmt: skip
        x, y = self.data[number % 4], self.targets[number % 4]
        losses = OBJECTIVES[self.architecture](self.dictionary, x, y, context)
        losses.total.backward()
        self.optimizer.step(1e-2)
        self.firing.record(losses.counts, losses.l0, self.batch, number + 1)
        self.losses.append(float(losses.total.detach()))


@pytest.mark.slow
@pytest.mark.parametrize("d_out", [None, 14])
@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
def test_triton_takes_the_cpu_s_steps(use, architecture: str, d_out: int | None) -> None:
    """With dead features from the third step on, so that AuxK and its blocks of gradients take part; also a
    transcoder's to a target of another width, with a skip connection.

    Adam makes a part of a step of the rounding in a gradient of nearly nothing, hence the tolerance of a tenth of one.
    """
    runs = []
    for name in ("cpu", "triton"):
        use(name)
        run = Trained(
            architecture, d_in=10, d_sae=96, batch=24, dead_after=48, device=DEVICE if name == "triton" else "cpu",
            d_out=d_out,
        )  # fmt: skip
        for number in range(4):
            run.step(number)
        assert len(run.firing.candidates) > 5, "no feature is dead, so AuxK is not tested"
        runs.append(run)
    assert runs[1].losses == pytest.approx(runs[0].losses, rel=1e-4)
    for (label, ours), theirs in zip(
        runs[1].dictionary.named_parameters(), runs[0].dictionary.parameters(), strict=True
    ):
        torch.testing.assert_close(
            ours.cpu(), theirs, rtol=1e-3, atol=1e-3, msg=lambda text, label=label: f"{label}: {text}"
        )


class Largest(TorchDispatchMode):
    """Notes the most numbers in one storage that an operator makes, views of older ones left out."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.operator = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in known:
                numbers = leaf.untyped_storage().nbytes() // leaf.element_size()
                is_new = func.overloadpacket is not torch.ops.aten.set_  # the interpreter's way to make a view
                if numbers > self.numbers and is_new:
                    self.numbers, self.operator = numbers, str(func)
        return result


def largest_tensor_of_a_step(architecture: str, d_in: int, d_sae: int, batch: int, device: str) -> tuple[int, str]:
    run = Trained(architecture, d_in=d_in, d_sae=d_sae, batch=batch, dead_after=10**9, device=device)
    recorder = Largest()
    with recorder:
        run.step(0)
    return recorder.numbers, recorder.operator


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
def test_a_step_makes_neither_all_pre_activations_nor_a_gradient_of_a_matrix(use, architecture: str) -> None:
    """Everything a step allocates is smaller than [batch, d_sae] and than [d_sae, d_in]; the dense step's is not."""
    d_in, d_sae, batch = 20, 2048, 24
    use("triton")
    numbers, operator = largest_tensor_of_a_step(architecture, d_in, d_sae, batch, DEVICE)
    assert 0 < numbers < d_sae * min(d_in, batch), operator
    use("reference")
    numbers, _ = largest_tensor_of_a_step(architecture, d_in, d_sae, batch, DEVICE)
    assert numbers >= batch * d_sae, "the recorder does not see dense tensors"
