"""The step as it is taken against the same step written densely: autograd, torch's Adam, projection, unit rows."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor

from sae.architectures import ARCHITECTURES
from sae.config import DictionaryConfig, TrainConfig
from sae.dictionary import Dictionary
from sae.training import IterableSource, train
from sae.training.firing import FiringRecord
from sae.training.initialise import initialise_
from sae.training.objectives import OBJECTIVES, Context
from sae.training.optimizer import FeatureAdam
from sae.training.schedules import learning_rate

D_IN, D_SAE, K, BATCH = 24, 192, 4, 96


def samples(count: int, dtype: torch.dtype) -> list[Tensor]:
    """Sparse sums of a fixed set of directions, and noise."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(100, D_IN, generator=generator), dim=1)
    batches = []
    for _ in range(count):
        codes = (torch.rand(BATCH, 100, generator=generator) < 0.04) * torch.rand(BATCH, 100, generator=generator)
        batches.append((codes @ directions + 0.02 * torch.randn(BATCH, D_IN, generator=generator)).to(dtype))
    return batches


def build(architecture: str, dtype: torch.dtype, x: Tensor) -> Dictionary:
    cls = ARCHITECTURES[architecture]
    dictionary = cls(D_IN, D_SAE, **({"k": K} if "k" in cls.setting_names else {}))
    initialise_(dictionary, x.float(), torch.Generator().manual_seed(1))
    return dictionary.to(dtype)


def dense_features(architecture: str, pre: Tensor) -> Tensor:
    """What fires, written with dense masks."""
    if architecture == "topk":
        return pre.relu() * torch.zeros_like(pre).scatter(1, pre.topk(K, dim=1).indices, 1.0)
    if architecture == "batch_topk":
        bound = pre.flatten().topk(K * len(pre)).values[-1]
        return pre.relu() * (pre >= bound)
    return pre.relu()


class DenseReference:
    """Dense autograd and plain PyTorch, for all architectures; AuxK on the features that are dead."""

    def __init__(self, architecture: str, dictionary: Dictionary, settings: TrainConfig) -> None:
        self.architecture, self.dictionary, self.settings = architecture, dictionary, settings
        parameters = [p for p in dictionary.parameters() if p.requires_grad]
        self.adam = torch.optim.Adam(parameters, betas=(settings.beta1, settings.beta2))
        self.silent = torch.zeros(D_SAE, dtype=torch.int64)

    def step(self, x: Tensor, rate: float) -> float:
        d, dead = self.dictionary, self.silent >= self.settings.dead_after_tokens
        pre = (x - d.b_dec) @ d.W_enc + d.b_enc
        features = dense_features(self.architecture, pre)
        error = x - features @ d.W_dec - d.b_dec
        loss = mse = error.square().sum(1).mean()
        if self.architecture == "relu":
            loss = loss + self.settings.l1_coefficient * (features @ d.W_dec.norm(dim=1)).mean()
        elif dead.any():
            k_aux = D_IN // 2
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


@pytest.mark.parametrize("density", [0.0, 1.0], ids=["computed sparsely", "computed densely"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steps_in_float64_are_those_of_dense_autograd_and_torch_s_adam(architecture: str, density: float) -> None:
    """Thirty steps, among them ones with dead features of which some come to life."""
    batches = samples(10, torch.float64)
    ours = build(architecture, torch.float64, batches[0])
    with torch.no_grad():
        ours.W_enc[:, :40] *= 0.2
    settings = TrainConfig(dead_after_tokens=4 * BATCH, l1_coefficient=0.3)
    reference = DenseReference(architecture, copy.deepcopy(ours), settings)
    optimizer = FeatureAdam(ours, settings.beta1, settings.beta2)
    firing = FiringRecord(D_SAE, settings.dead_after_tokens, torch.device("cpu"), refresh_every=1)
    most_dead = 0
    for step, x in enumerate(itertools.islice(itertools.cycle(batches), 30), 1):
        context = Context(
            firing.dead, firing.candidates, settings.l1_coefficient, settings.aux_coefficient, D_IN // 2, density,
            optimizer.encoder_sink, optimizer.decoder_sink,
        )  # fmt: skip
        most_dead = max(most_dead, len(firing.candidates))
        losses = OBJECTIVES[architecture](ours, x, context)
        losses.total.backward()
        optimizer.step(1e-2)
        firing.record(losses.fired, losses.l0, len(x), step)
        assert float(losses.terms["mse"]) == pytest.approx(reference.step(x, 1e-2), rel=1e-9), step
    if architecture != "relu":
        assert most_dead > D_IN, "too few features died for AuxK to be tested"
    for (name, found), expected in zip(ours.named_parameters(), reference.dictionary.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(ours.W_dec.norm(dim=1), torch.ones(D_SAE, dtype=torch.float64))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_loss_curve_of_training_is_that_of_the_dense_reference(architecture: str) -> None:
    """`train` itself, float32, a hundred steps: the logged error differs by less than 1e-4 of itself.

    With ten times the learning rate, so small a batch is chaotic: dense float32 and dense float64 part as soon.
    """
    batches = samples(25, torch.float32)
    settings = TrainConfig(
        tokens=100 * BATCH, batch_size=BATCH, log_every=1, lr=1e-3, l1_coefficient=0.3, l1_warmup_fraction=0
    )
    curve: list[float] = []
    shape = DictionaryConfig(architecture=architecture, d_sae=D_SAE, k=K)  # type: ignore[arg-type]
    source = IterableSource(batches)
    train(source, shape, settings, seed=1, progress=lambda done, of, metrics: curve.append(float(metrics["mse"])))
    scale = (D_IN / source.statistics.mean_squared_norm) ** 0.5
    reference = DenseReference(architecture, build(architecture, torch.float32, batches[0] * scale), settings)
    for step, x in enumerate(itertools.islice(itertools.cycle(batches), 100)):
        rate = learning_rate(step, 100, 1e-3, settings.warmup_fraction, settings.decay_fraction)
        assert curve[step] == pytest.approx(reference.step(x * scale, rate), rel=1e-4), step
    assert curve[-1] < 0.8 * curve[0]


def test_the_optimizer_s_state_survives_a_checkpoint() -> None:
    x = samples(1, torch.float32)[0]

    def some_steps(optimizer: FeatureAdam, count: int) -> None:
        for _ in range(count):
            context = Context(
                torch.zeros(D_SAE, dtype=torch.bool), torch.zeros(0, dtype=torch.int64), 0.0, 0.0, 1,
                encoder_sink=optimizer.encoder_sink, decoder_sink=optimizer.decoder_sink, low=optimizer.low,
            )  # fmt: skip
            OBJECTIVES["topk"](optimizer.dictionary, x, context).total.backward()
            optimizer.step(1e-2)

    first = FeatureAdam(build("topk", torch.float32, x), 0.9, 0.999, low_precision=True)
    some_steps(first, 3)
    second = FeatureAdam(copy.deepcopy(first.dictionary), 0.9, 0.999, low_precision=True)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for optimizer in (first, second):
        some_steps(optimizer, 2)
    for ours, theirs in zip(first.dictionary.parameters(), second.dictionary.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(first.low, first.dictionary.W_enc.T.bfloat16())
