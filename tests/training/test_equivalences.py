"""Architectures that are another one at a corner of their settings, and gradients known in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sae.architectures import BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, TopK
from sae.dictionary.base import Dictionary
from sae.training.objectives import StepInputs, batch_topk_loss, gated_loss, jumprelu_loss, matryoshka_loss, relu_loss
from sae.training.objectives import topk_loss as topk
from sae.training.objectives.penalised import jump, step
from sae.training.objectives.selected import by_groups

D_IN, D_SAE, K, BATCH = 6, 20, 3, 15


def filled(dictionary: Dictionary, like: Dictionary | None = None) -> Dictionary:
    """Random weights in float64, or those of another dictionary as far as both have them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in dictionary.double().named_parameters():
            if like is not None and name in dict(like.named_parameters()):
                parameter.copy_(like.get_parameter(name))
            elif like is None:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return dictionary


def inputs(rows: int = BATCH) -> Tensor:
    return torch.randn(rows, D_IN, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def context(dead: int = 0, sparsity: float = 0.3, bandwidth: float = 0.5) -> StepInputs:
    is_dead = torch.arange(D_SAE) < dead
    return StepInputs(is_dead, is_dead.nonzero().flatten(), sparsity, 1 / 32, 4, bandwidth=bandwidth)


def gradients(loss: Tensor, dictionary: Dictionary) -> dict[str, Tensor]:
    trained = {name: p for name, p in dictionary.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-11, atol=1e-13, msg=name)


@pytest.mark.parametrize("dead", [0, 5])
def test_batch_topk_of_one_row_is_topk(dead: int) -> None:
    one, other = filled(TopK(D_IN, D_SAE, k=K)), BatchTopK(D_IN, D_SAE, k=K)
    filled(other, one)
    for row in inputs():
        x = row[None]
        theirs, ours = topk(one, x, x, context(dead)), batch_topk_loss(other, x, x, context(dead))
        torch.testing.assert_close(ours.total, theirs.total, rtol=1e-12, atol=0)
        assert torch.equal(ours.counts, theirs.counts)
        assert_same_gradients(gradients(ours.total, other), gradients(theirs.total, one))


@pytest.mark.parametrize("dead", [0, 5])
def test_matryoshka_of_one_group_is_batch_topk(dead: int) -> None:
    one, other = filled(BatchTopK(D_IN, D_SAE, k=K)), Matryoshka(D_IN, D_SAE, k=K, prefixes=(1.0,))
    filled(other, one)
    x = inputs()
    theirs, ours = batch_topk_loss(one, x, x, context(dead)), matryoshka_loss(other, x, x, context(dead))
    torch.testing.assert_close(ours.total, theirs.total, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.terms["mse"], theirs.terms["mse"], rtol=1e-12, atol=0)
    assert torch.equal(ours.threshold, theirs.threshold)
    assert_same_gradients(gradients(ours.total, other), gradients(theirs.total, one))


@pytest.mark.parametrize("density", [0.0, 1.0], ids=["sparsely", "densely"])
def test_gated_with_tied_paths_is_relu(density: float) -> None:
    """r = 0 and b_mag = b_gate: the same features; and at λ the error's part of the gradients is ReLU's."""
    relu, gated = filled(ReLU(D_IN, D_SAE)), Gated(D_IN, D_SAE)
    filled(gated, relu)
    with torch.no_grad():
        gated.b_gate.copy_(relu.b_enc)
        gated.b_mag.copy_(relu.b_enc)
    x = inputs()
    torch.testing.assert_close(gated.encode(x), relu.encode(x), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gated(x), relu(x), rtol=1e-13, atol=1e-13)
    where = StepInputs(torch.zeros(D_SAE, dtype=torch.bool), torch.zeros(0, dtype=torch.int64), 0.0, 0.0, 1, density)
    ours, theirs = gated_loss(gated, x, x, where), relu_loss(relu, x, x, where)
    torch.testing.assert_close(ours.total, 2 * theirs.total, rtol=1e-12, atol=0)
    of_gated, of_relu = gradients(ours.total, gated), gradients(theirs.total, relu)
    torch.testing.assert_close(of_gated["W_dec"], of_relu["W_dec"], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(of_gated["b_mag"], of_relu["b_enc"], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(of_gated["b_gate"], of_relu["b_enc"], rtol=1e-11, atol=1e-13)


def test_jumprelu_with_thresholds_of_zero_is_relu() -> None:
    relu, jumprelu = filled(ReLU(D_IN, D_SAE)), JumpReLU(D_IN, D_SAE)
    filled(jumprelu, relu)
    x = inputs()
    torch.testing.assert_close(jumprelu.encode(x), relu.encode(x), rtol=1e-13, atol=1e-13)
    ours = jumprelu_loss(jumprelu, x, x, context(sparsity=0.0))
    theirs = relu_loss(relu, x, x, context(sparsity=0.0))
    torch.testing.assert_close(ours.total, theirs.total, rtol=1e-12, atol=0)
    of_relu = gradients(theirs.total, relu)
    of_jumprelu = gradients(ours.total, jumprelu)
    assert_same_gradients({name: of_jumprelu[name] for name in of_relu}, of_relu)


def test_the_straight_through_gradient_of_l0_on_the_uniform_distribution_is_minus_one() -> None:
    """E[z > θ] = 1 − θ for z ~ U(0, 1): its slope is −1, which the estimator must have on average."""
    z = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    for width in (0.01, 0.1, 0.5):
        threshold = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        step(z, threshold.expand(len(z)), width).mean().backward()
        assert float(threshold.grad) == pytest.approx(-1, abs=1e-5)  # type: ignore[arg-type]


def test_the_straight_through_gradient_of_the_activation_is_minus_the_threshold() -> None:
    """d/dθ E[z · (z > θ)] = −θ for z ~ U(0, 1), and z itself has the gradient of what fires."""
    z = ((torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000).requires_grad_()
    threshold = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    jump(z, threshold.expand(len(z)), 0.1).mean().backward()
    assert float(threshold.grad) == pytest.approx(-0.4, abs=1e-5)  # type: ignore[arg-type]
    assert torch.equal(z.grad * len(z), (z.detach() > 0.4).double())  # type: ignore[operator]


def test_pre_activations_just_below_the_threshold_move_it() -> None:
    """They do not fire, and the penalty must still know of them: the trap of thresholds that only rise."""
    dictionary = filled(JumpReLU(D_IN, D_SAE))
    x = inputs(1)
    pre = dictionary.pre_activations(x)[0].detach()
    feature = int(pre.argmax())
    with torch.no_grad():
        dictionary.threshold.fill_(1e3)
        dictionary.threshold[feature] = pre[feature] + 0.1
    slopes = gradients(jumprelu_loss(dictionary, x, x, context(sparsity=1.0, bandwidth=0.5)).total, dictionary)
    assert float(slopes["threshold"][feature]) != 0
    assert int((slopes["threshold"] != 0).sum()) == 1


def test_pairs_are_dealt_out_to_their_groups() -> None:
    x = inputs()
    dictionary = filled(Matryoshka(D_IN, D_SAE, k=K, prefixes=(0.1, 0.5, 1.0)))
    selection = dictionary.select(x)
    grouped = by_groups(selection.pattern, dictionary.prefix_ends)
    assert grouped.batch == 3 * BATCH
    dense = grouped.dense(selection.values).view(BATCH, 3, D_SAE)
    whole = selection.pattern.dense(selection.values)
    for number, (first, last) in enumerate([(0, 2), (2, 10), (10, 20)]):
        expected = torch.zeros_like(whole)
        expected[:, first:last] = whole[:, first:last]
        assert torch.equal(dense[:, number], expected)


@pytest.mark.parametrize(
    "prefixes",
    [(), (0.5,), (0.5, 0.5, 1.0), (1.0, 0.5), (0.01, 1.0)],
    ids=["none", "short", "twice", "falling", "empty"],
)
def test_prefixes_that_nest_nothing_are_refused(prefixes: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="expected ascending shares of d_sae=20 that end in 1"):
        Matryoshka(D_IN, D_SAE, k=K, prefixes=prefixes)
