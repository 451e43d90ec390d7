"""Losses and their gradients against dense formulas and plain autograd in float64, on ordinary and degenerate input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sae.architectures import Gated, JumpReLU, ReLU, TopK
from sae.dictionary.base import Dictionary
from sae.training.firing import FiringRecord
from sae.training.initialise import initialise_
from sae.training.objectives import StepInputs, gated_loss, jumprelu_loss, relu_loss, topk_loss
from sae.training.optimizer import FeatureAdam
from tests.support.dense_reference import straight_through

D_IN, D_SAE, K, BATCH = 6, 20, 3, 15


def random_dictionary(cls: type[Dictionary], seed: int = 0, **settings: int) -> Dictionary:
    dictionary = cls(D_IN, D_SAE, **settings).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return dictionary


def context(
    dead: Tensor | None = None, candidates: Tensor | None = None, k_aux: int = 4, l1: float = 0.3
) -> StepInputs:
    dead = torch.zeros(D_SAE, dtype=torch.bool) if dead is None else dead
    listed = dead.nonzero().flatten() if candidates is None else candidates
    return StepInputs(dead=dead, dead_candidates=listed, sparsity=l1, aux_coefficient=1 / 32, k_aux=k_aux)


def dense_topk_loss(dictionary: Dictionary, x: Tensor, k: int, context: StepInputs) -> Tensor:
    """The same objective written densely, straight from Gao et al. 2024, for autograd to differentiate."""
    pre = (x - dictionary.b_dec) @ dictionary.W_enc + dictionary.b_enc
    kept = torch.zeros_like(pre)
    kept.scatter_(1, pre.detach().argsort(dim=1, descending=True)[:, :k], 1.0)
    x_hat = torch.relu(pre) * kept @ dictionary.W_dec + dictionary.b_dec
    loss = ((x - x_hat) ** 2).sum(1).mean()
    dead = int(context.dead.sum())
    if dead:
        among_dead = pre.detach().masked_fill(~context.dead, -torch.inf)
        kept = torch.zeros_like(pre)
        kept.scatter_(1, among_dead.argsort(dim=1, descending=True)[:, : min(context.k_aux, dead)], 1.0)
        guess = torch.relu(pre) * kept @ dictionary.W_dec
        share = min(dead / context.k_aux, 1.0)
        loss = loss + context.aux_coefficient * share * (((x - x_hat).detach() - guess) ** 2).sum(1).mean()
    return loss


def dense_relu_loss(dictionary: Dictionary, x: Tensor, context: StepInputs) -> Tensor:
    features = torch.relu((x - dictionary.b_dec) @ dictionary.W_enc + dictionary.b_enc)
    x_hat = features @ dictionary.W_dec + dictionary.b_dec
    penalty = (features * (dictionary.W_dec**2).sum(1).sqrt()).sum(1).mean()
    return ((x - x_hat) ** 2).sum(1).mean() + context.sparsity * penalty


def gradients(loss: Tensor, dictionary: Dictionary) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(dictionary.parameters()))
    return dict(zip((name for name, _ in dictionary.named_parameters()), found, strict=True))


def inputs(kind: str) -> Tensor:
    x = torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    if kind == "zero row":
        x[3] = 0
    if kind == "repeated rows":
        x[1:] = x[0]
    if kind == "one row":
        x = x[:1]
    return x


def some_dead(count: int) -> Tensor:
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[torch.randperm(D_SAE, generator=torch.Generator().manual_seed(3))[:count]] = True
    return dead


@pytest.mark.parametrize("kind", ["ordinary", "zero row", "repeated rows", "one row"])
@pytest.mark.parametrize("dead", [0, 1, 3, 4, 11, D_SAE])
def test_topk_loss_and_gradients_equal_the_dense_formula(kind: str, dead: int) -> None:
    dictionary, x = random_dictionary(TopK, k=K), inputs(kind)
    where = context(some_dead(dead))
    losses = topk_loss(dictionary, x, x, where)
    expected = dense_topk_loss(dictionary, x, K, where)
    torch.testing.assert_close(losses.total, expected, rtol=1e-12, atol=1e-12)
    expected_gradients = gradients(expected, dictionary)
    for name, gradient in gradients(losses.total, dictionary).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-10, atol=1e-12, msg=name)


def test_topk_with_k_above_the_number_of_positive_pre_activations() -> None:
    dictionary, x = random_dictionary(TopK, k=15), inputs("ordinary")
    with torch.no_grad():
        dictionary.b_enc -= 1.5
    losses = topk_loss(dictionary, x, x, context())
    pre = (x - dictionary.b_dec) @ dictionary.W_enc + dictionary.b_enc
    assert (pre > 0).sum(1).max() < 15, "the case is not the one meant"
    assert float(losses.l0) == pytest.approx(float((pre > 0).sum(1).double().mean()))
    assert torch.equal(losses.counts, (pre > 0).sum(0).to(losses.counts.dtype))
    expected = dense_topk_loss(dictionary, x, 15, context())
    for name, gradient in gradients(losses.total, dictionary).items():
        torch.testing.assert_close(gradient, gradients(dense_topk_loss(dictionary, x, 15, context()), dictionary)[name])
    torch.testing.assert_close(losses.total, expected)


def test_auxk_reaches_encoder_and_decoder_of_dead_features_only() -> None:
    dictionary, x = random_dictionary(TopK, k=K), inputs("ordinary")
    dead = some_dead(5)
    with torch.no_grad():
        dictionary.b_enc[dead] = -4.0  # they never win the top k, yet are positive for nobody ...
        dictionary.b_enc[dead.nonzero()[0]] = 0.5  # ... but one
    with_aux = gradients(topk_loss(dictionary, x, x, context(dead)).total, dictionary)
    without = gradients(topk_loss(dictionary, x, x, context()).total, dictionary)
    changed = (with_aux["W_enc"] - without["W_enc"]).abs().amax(0) > 0
    assert changed.any(), "AuxK gives the encoder no gradient"
    assert not (changed & ~dead).any(), "AuxK reaches the encoder of living features"
    changed = (with_aux["W_dec"] - without["W_dec"]).abs().amax(1) > 0
    assert changed.any()
    assert not (changed & ~dead).any()


def test_auxk_teaches_gated_s_dead_features_what_to_be_worth_and_their_gates_rise() -> None:
    """Both ways of computing the codes: where they are dense, nothing else about the dead features may change."""
    dictionary, x = random_dictionary(Gated), inputs("ordinary")
    dead = some_dead(5)
    with torch.no_grad():
        dictionary.get_parameter("b_gate")[dead] = -50.0  # shut on every row, whatever the magnitude
    for density in (0.0, 1.0):
        with_aux = gradients(gated_loss(dictionary, x, x, replace(context(dead), density=density)).total, dictionary)
        without = gradients(gated_loss(dictionary, x, x, replace(context(), density=density)).total, dictionary)
        for name, axis in {"W_enc": 0, "W_dec": 1, "r_mag": None, "b_mag": None}.items():
            difference = (with_aux[name] - without[name]).abs()
            changed = (difference if axis is None else difference.amax(axis)) > 1e-12
            assert torch.equal(changed, dead), f"{name}: AuxK reaches {changed.nonzero().flatten().tolist()}"
        rise = without["b_gate"] - with_aux["b_gate"]
        torch.testing.assert_close(rise, dead.double() / 32, rtol=0, atol=1e-12)


def test_auxk_ignores_candidates_that_have_come_to_life() -> None:
    dictionary, x = random_dictionary(TopK, k=K), inputs("ordinary")
    dead = some_dead(3)
    stale_list = some_dead(9).nonzero().flatten()
    assert set(dead.nonzero().flatten().tolist()) < set(stale_list.tolist())
    fresh = topk_loss(dictionary, x, x, context(dead))
    stale = topk_loss(dictionary, x, x, context(dead, stale_list))
    torch.testing.assert_close(stale.total, fresh.total, rtol=1e-12, atol=0)


def test_auxk_target_leaves_out_the_decoder_bias() -> None:
    """Shifting data and b_dec together changes neither residual nor guess, so AuxK must not move."""
    dictionary, x = random_dictionary(TopK, k=K), inputs("ordinary")
    before = topk_loss(dictionary, x, x, context(some_dead(6))).terms["aux"]
    shift = torch.linspace(-30, 30, D_IN, dtype=torch.float64)
    with torch.no_grad():
        dictionary.b_dec += shift
    after = topk_loss(dictionary, x + shift, x + shift, context(some_dead(6))).terms["aux"]
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("kind", ["ordinary", "zero row", "repeated rows", "one row"])
def test_relu_loss_and_gradients_equal_the_dense_formula(kind: str) -> None:
    dictionary, x = random_dictionary(ReLU), inputs(kind)
    losses = relu_loss(dictionary, x, x, context())
    expected = dense_relu_loss(dictionary, x, context())
    torch.testing.assert_close(losses.total, expected, rtol=1e-12, atol=1e-12)
    expected_gradients = gradients(expected, dictionary)
    for name, gradient in gradients(losses.total, dictionary).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("objective", [topk_loss, relu_loss])
def test_gradients_equal_finite_differences(objective: object) -> None:
    dictionary = random_dictionary(TopK, k=K) if objective is topk_loss else random_dictionary(ReLU)
    x, where = inputs("ordinary"), context()
    analytic = gradients(objective(dictionary, x, x, where).total, dictionary)  # type: ignore[operator]
    step = 1e-6
    for name, parameter in dictionary.named_parameters():
        by_feature = parameter.data.T if name == "W_enc" else parameter.data
        flat, slopes = by_feature.view(-1), (analytic[name].T if name == "W_enc" else analytic[name]).reshape(-1)
        for position in range(0, len(flat), 7):
            start = float(flat[position])
            flat[position] = start + step
            above = float(objective(dictionary, x, x, where).total.detach())  # type: ignore[operator]
            flat[position] = start - step
            below = float(objective(dictionary, x, x, where).total.detach())  # type: ignore[operator]
            flat[position] = start
            slope = (above - below) / (2 * step)
            assert float(slopes[position]) == pytest.approx(slope, rel=1e-5, abs=1e-7), name


def test_optimum_of_one_latent_with_l1() -> None:
    """min_f (x − f)² + λ f over f ≥ 0 is max(0, x − λ/2)."""
    for x_value, weight in [(2.0, 1.0), (0.3, 1.0), (1.0, 0.2)]:
        dictionary = ReLU(1, 1).double()
        with torch.no_grad():
            dictionary.W_dec.fill_(1.0)
            dictionary.W_enc.fill_(1.0)
        x = torch.tensor([[x_value]], dtype=torch.float64)
        optimizer = torch.optim.SGD([dictionary.b_enc], lr=0.1)
        for _ in range(300):
            optimizer.zero_grad()
            relu_loss(dictionary, x, x, context(l1=weight)).total.backward()
            optimizer.step()
        assert float(dictionary.encode(x).detach()) == pytest.approx(max(0.0, x_value - weight / 2), abs=1e-6)


def test_a_shut_gated_feature_learns_the_direction_that_is_missing() -> None:
    """Eight orthogonal directions in the data, seven in the dictionary, the eighth feature shut and pointing elsewhere.

    What it learns it can learn from AuxK alone: in 300 steps of 0.01 its gate, shut at −5, does not open.
    """
    generator = torch.Generator().manual_seed(0)
    dictionary, dead = Gated(8, 8), torch.arange(8) == 7
    with torch.no_grad():
        dictionary.W_dec.copy_(torch.eye(8))
        dictionary.W_dec[7] = torch.tensor([0.9, 0, 0, 0, 0, 0, 0, 0.19**0.5])
        dictionary.W_enc.copy_(dictionary.W_dec.T)
        dictionary.b_enc[7] = -5.0
    optimizer = FeatureAdam(dictionary, 0.9, 0.999)
    for _ in range(300):
        x = (torch.rand(64, 8, generator=generator) < 0.2) * torch.rand(64, 8, generator=generator)
        where = StepInputs(
            dead, dead.nonzero().flatten(), 0.1, 1.0, 1, 0.2, optimizer.encoder_sink, optimizer.decoder_sink
        )
        losses = gated_loss(dictionary, x, x, where)
        assert losses.counts[7] == 0, "the feature came to life, so AuxK is not what is tested"
        losses.total.backward()
        optimizer.step(1e-2)
    assert float(dictionary.W_dec[7, 7].detach()) > 0.95, "it has not learnt to write the missing direction"
    read = dictionary.W_enc[:, 7].detach()
    assert float(read[7] / read.norm()) > 0.9, "it has not learnt to read it"


def dead_after_training(aux_coefficient: float) -> int:
    """Half of the features begin with encoders so weak that they lose every competition; 300 steps later."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(200, 32, generator=generator), dim=1)
    dictionary = TopK(32, 128, k=4)
    initialise_(dictionary, torch.randn(100, 32, generator=generator), generator)
    with torch.no_grad():
        dictionary.W_enc[:, 64:] *= 0.1
    optimizer = FeatureAdam(dictionary, 0.9, 0.999)
    firing = FiringRecord(128, dead_after=20 * 128, device=torch.device("cpu"))
    for step in range(300):
        codes = (torch.rand(128, 200, generator=generator) < 0.02) * torch.rand(128, 200, generator=generator)
        x = codes @ directions
        where = StepInputs(
            firing.dead, firing.candidates, 0.0, aux_coefficient, 16, firing.density,
            optimizer.encoder_sink, optimizer.decoder_sink,
        )  # fmt: skip
        losses = topk_loss(dictionary, x, x, where)
        losses.total.backward()
        optimizer.step(3e-3)
        firing.record(losses.counts, losses.l0, len(x), step + 1)
    return int(firing.dead.sum())


def test_auxk_revives_features_that_lose_every_competition() -> None:
    without, with_aux = dead_after_training(0.0), dead_after_training(1 / 32)
    assert without > 40, f"only {without} features stay dead without AuxK, so the test shows nothing"
    assert with_aux < without / 3, f"{with_aux} dead with AuxK, {without} without"


@pytest.mark.parametrize("aim", [None, 4])
def test_jumprelu_loss_and_gradients_equal_the_dense_formula(aim: int | None) -> None:
    """Both penalties: L0 itself, and its distance from a target. Their straight-through gradients written densely."""
    dictionary, x = random_dictionary(JumpReLU), inputs("ordinary")
    threshold, width, weight = dictionary.get_parameter("threshold"), 0.8, 1.7
    with torch.no_grad():
        threshold.abs_()
    losses = jumprelu_loss(dictionary, x, x, replace(context(), sparsity=weight, target_l0=aim, bandwidth=width))
    pre = ((x - dictionary.b_dec) @ dictionary.W_enc + dictionary.b_enc).relu()
    features, fires = straight_through(pre, threshold, width)
    l0 = fires.sum(1).mean()
    penalty = l0 if aim is None else (l0 / aim - 1) ** 2
    expected = ((x - features @ dictionary.W_dec - dictionary.b_dec) ** 2).sum(1).mean() + weight * penalty
    torch.testing.assert_close(losses.total, expected, rtol=1e-12, atol=0)
    expected_gradients = gradients(expected, dictionary)
    for name, gradient in gradients(losses.total, dictionary).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-10, atol=1e-12, msg=name)
