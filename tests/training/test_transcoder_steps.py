"""A transcoder's training steps against dense autograd, and against the SAE or the transcoder that they must equal."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from sae.architectures import ARCHITECTURES
from sae.config.settings import DictionaryConfig, TrainConfig
from sae.dictionary.base import Dictionary
from sae.dictionary.frame import PLAIN, Frame
from sae.kernels.pattern import Pattern
from sae.kernels.sparse import squared_error
from sae.training.firing import FiringRecord
from sae.training.objectives import OBJECTIVES, Losses, StepInputs
from sae.training.optimizer import FeatureAdam
from sae.training.recipe import build
from tests.support.dense_reference import DenseReference

D_IN, D_OUT, D_SAE, K, BATCH = 12, 7, 48, 3, 40
DENSELY = [*((name, 0.0) for name in ARCHITECTURES), ("relu", 1.0), ("gated", 1.0)]
SETTINGS = TrainConfig(
    dead_after_tokens=4 * BATCH, aux_coefficient=1 / 32, l1_coefficient=0.3, l0_coefficient=0.01, bandwidth=0.2
)


def rows(width: int, seed: int) -> Tensor:
    return torch.randn(BATCH, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


def transcoder(architecture: str, *, skip: bool, d_out: int = D_OUT) -> Dictionary:
    """Random weights in float64."""
    dictionary = build(DictionaryConfig(architecture=architecture, d_sae=D_SAE, k=K, skip=skip), D_IN, d_out)  # type: ignore[arg-type]
    assert dictionary.frame == Frame(skip=skip, d_out=d_out)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in dictionary.double().named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(drawn.abs() if name == "threshold" else drawn if name.startswith("W_") else 0.3 * drawn)
        dictionary.W_dec /= dictionary.W_dec.norm(dim=1, keepdim=True)
    return dictionary


def inputs(architecture: str, dead: Tensor, density: float = 0.0) -> StepInputs:
    weight = SETTINGS.l0_coefficient if architecture == "jumprelu" else SETTINGS.l1_coefficient
    assert weight is not None
    return StepInputs(
        dead, dead.nonzero().flatten(), weight, SETTINGS.aux_coefficient, D_IN // 2, density,
        bandwidth=SETTINGS.bandwidth,
    )  # fmt: skip


def gradients(loss: Tensor, dictionary: Dictionary) -> dict[str, Tensor]:
    trained = {name: p for name, p in dictionary.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(trained.items(), found, strict=True)
    }  # fmt: skip


def check_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dead", [0, 3, 11])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("architecture", "density"), DENSELY)
def test_every_gradient_is_that_of_dense_autograd(architecture: str, density: float, skip: bool, dead: int) -> None:
    ours = transcoder(architecture, skip=skip)
    is_dead = torch.arange(D_SAE) % 4 == 1
    is_dead[torch.arange(D_SAE) >= 4 * dead] = False
    assert int(is_dead.sum()) == dead
    reference = DenseReference(architecture, ours, SETTINGS)
    reference.silent = 4 * BATCH * is_dead
    x, y = rows(D_IN, 2), rows(D_OUT, 3)
    losses = OBJECTIVES[architecture](ours, x, y, inputs(architecture, is_dead, density))
    expected, mse, features = reference.loss(x, y)
    torch.testing.assert_close(losses.total, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.terms["mse"], mse.detach(), rtol=1e-12, atol=0)
    assert torch.equal(losses.counts, (features > 0).sum(0).to(losses.counts.dtype))
    found = gradients(losses.total, ours)
    check_same(found, gradients(expected, ours))
    assert all(bool(found[name].any()) for name in found), "a parameter has no gradient"
    assert ("W_skip" in found) == skip


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("architecture", "density"), DENSELY)
def test_steps_in_float64_are_those_of_dense_autograd_and_torch_s_adam(
    architecture: str, density: float, skip: bool
) -> None:
    """Thirty steps, among them ones with dead features of which some come to life."""
    ours = transcoder(architecture, skip=skip)
    with torch.no_grad():
        ours.W_enc[:, :12] *= 0.2
        ours.b_enc[:12] -= 2.0 if architecture in ("relu", "gated") else 0.0
    reference = DenseReference(architecture, copy.deepcopy(ours), SETTINGS)
    optimizer = FeatureAdam(ours, SETTINGS.beta1, SETTINGS.beta2)
    firing = FiringRecord(D_SAE, 4 * BATCH, torch.device("cpu"), refresh_every=1)
    weight = SETTINGS.l0_coefficient if architecture == "jumprelu" else SETTINGS.l1_coefficient
    most_dead = 0
    for step in range(1, 31):
        x, y = rows(D_IN, 100 + step % 10), rows(D_OUT, 200 + step % 10)
        context = StepInputs(
            firing.dead, firing.candidates, weight or 0.0, SETTINGS.aux_coefficient, D_IN // 2, density,
            optimizer.encoder_sink, optimizer.decoder_sink, bandwidth=SETTINGS.bandwidth,
        )  # fmt: skip
        most_dead = max(most_dead, len(firing.candidates))
        losses = OBJECTIVES[architecture](ours, x, y, context)
        losses.total.backward()
        optimizer.step(1e-2)
        firing.record(losses.counts, losses.l0, len(x), step)
        assert float(losses.terms["mse"]) == pytest.approx(reference.step(x, 1e-2, y), rel=1e-9), step
    assert most_dead > 0, "no feature died, so its revival is not tested"
    for (name, found), expected in zip(ours.named_parameters(), reference.dictionary.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("architecture", "density"), DENSELY)
def test_a_transcoder_of_its_input_is_an_sae(architecture: str, density: float) -> None:
    """With the biases of the SAE's encoder less b_dec W_enc: equal outputs and losses, and gradients that are equal by
    the chain rule through this map, which autograd takes here.

    Dead features are left out where their own biases are in the loss, which the map changes.
    """
    sae = transcoder(architecture, skip=False, d_out=D_IN)
    sae.frame = PLAIN
    other = transcoder(architecture, skip=False, d_out=D_IN)
    is_dead = torch.arange(D_SAE) < (0 if architecture in ("relu", "gated") else 5)
    x, context = rows(D_IN, 4), inputs(architecture, is_dead, density)
    mapped = {name: p * 1 for name, p in sae.named_parameters()}
    shift = sae.b_dec @ sae.W_enc
    if architecture == "gated":
        mapped["b_gate"] = mapped["b_gate"] - shift
        mapped["b_mag"] = mapped["b_mag"] - sae.get_parameter("r_mag").exp() * shift
    else:
        mapped["b_enc"] = mapped["b_enc"] - shift
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(mapped[name])
    torch.testing.assert_close(other(x), sae(x), rtol=1e-10, atol=1e-10)
    ours, theirs = (OBJECTIVES[architecture](each, x, x, context) for each in (other, sae))
    torch.testing.assert_close(ours.total, theirs.total, rtol=1e-10, atol=0)
    assert torch.equal(ours.counts, theirs.counts)
    of_other = gradients(ours.total, other)
    trained = [p for p in sae.parameters() if p.requires_grad]
    chained = torch.autograd.grad([mapped[name] for name in of_other], trained, list(of_other.values()))
    check_same(dict(zip(of_other, chained, strict=True)), gradients(theirs.total, sae))


@pytest.mark.parametrize(("architecture", "density"), DENSELY)
def test_a_skip_connection_of_zero_is_none(architecture: str, density: float) -> None:
    """Equal bits; and the gradient of W_skip is −2 xᵀ e / rows, with e the error."""
    with_skip, without = transcoder(architecture, skip=True), transcoder(architecture, skip=False)
    with torch.no_grad():
        for name, parameter in with_skip.named_parameters():
            parameter.zero_() if name == "W_skip" else parameter.copy_(without.get_parameter(name))
    is_dead = torch.arange(D_SAE) < 5
    x, y, context = rows(D_IN, 5), rows(D_OUT, 6), inputs(architecture, is_dead, density)
    losses: list[Losses] = [OBJECTIVES[architecture](each, x, y, context) for each in (with_skip, without)]
    assert torch.equal(losses[0].total, losses[1].total)
    found, expected = gradients(losses[0].total, with_skip), gradients(losses[1].total, without)
    of_skip = found.pop("W_skip")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    error = _error(architecture, without, x, y)
    torch.testing.assert_close(of_skip, -2 / BATCH * x.T @ error, rtol=1e-10, atol=1e-12)


def _error(architecture: str, dictionary: Dictionary, x: Tensor, y: Tensor) -> Tensor:
    """y − ŷ of the features that fire in training; of Matryoshka, the mean over its prefixes."""
    with torch.no_grad():
        _, _, features = DenseReference(architecture, dictionary, SETTINGS).loss(x, y)
        ends = getattr(dictionary, "prefix_sizes", (D_SAE,))
        parts = [y - features[:, :end] @ dictionary.W_dec[:end] - dictionary.b_dec for end in ends]
    return torch.stack(parts).mean(0)


def test_the_gradient_of_the_target_is_twice_the_error_over_the_rows() -> None:
    """Through both outputs of the sparse core's squared error, against finite differences too."""
    generator = torch.Generator().manual_seed(9)
    features = torch.randint(0, 6, (5, 2), generator=generator)
    pattern = Pattern.from_indices(features, 6)
    values, decoder, bias, target = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((10,), (6, 4), (4,), (5, 4))
    )
    error, residual = squared_error(pattern, values, decoder, bias, target)
    gradient = torch.autograd.grad(3 * error, target)[0]
    torch.testing.assert_close(gradient, 3 * 2 * residual / 5, rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(
        lambda *parts: squared_error(pattern, *parts)[0], (values, decoder, bias, target), eps=1e-6
    )
