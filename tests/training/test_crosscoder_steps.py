"""A crosscoder's training steps against dense autograd, the papers' own form, and the SAE that they must equal."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sae.architectures import ARCHITECTURES, BatchTopK
from sae.config.settings import DictionaryConfig, TrainConfig
from sae.dictionary.base import Dictionary
from sae.dictionary.frame import PLAIN, Frame
from sae.kernels import back_end
from sae.kernels.interface import Gradient
from sae.training import IterableSource, JoinedSource, Recipe
from sae.training.decoder_rows import tangent
from sae.training.firing import FiringRecord
from sae.training.objectives import OBJECTIVES, StepInputs, batch_topk_loss
from sae.training.optimizer import FeatureAdam
from sae.training.recipe import build
from sae.training.trainer import Trainer
from tests.support.dense_reference import DenseReference

SITES = (5, 4, 3)
D_IN, D_SAE, K, BATCH = sum(SITES), 48, 3, 40
DENSELY = [*((name, 0.0) for name in ARCHITECTURES), ("relu", 1.0), ("gated", 1.0)]
SETTINGS = TrainConfig(
    dead_after_tokens=4 * BATCH, aux_coefficient=1 / 32, l1_coefficient=0.3, l0_coefficient=0.01, bandwidth=0.2
)


def rows(width: int, seed: int) -> Tensor:
    return torch.randn(BATCH, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


def crosscoder(architecture: str, widths: tuple[int, ...] = SITES) -> Dictionary:
    """Random weights in float64; in some decoder rows, the part of a site is 0."""
    config = DictionaryConfig(architecture=architecture, d_sae=D_SAE, k=K)  # type: ignore[arg-type]
    dictionary = build(config, sum(widths), site_widths=widths)
    assert dictionary.frame == Frame(site_widths=widths)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in dictionary.double().named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(drawn.abs() if name == "threshold" else drawn if name.startswith("W_") else 0.3 * drawn)
        if len(widths) > 1:
            dictionary.W_dec[: D_SAE // 4, : widths[0]] = 0
        dictionary.W_dec /= norms(dictionary.W_dec, widths).sum(1, keepdim=True)
    return dictionary


def norms(rows: Tensor, widths: tuple[int, ...]) -> Tensor:
    """By site, in plain loops."""
    found, start = [], 0
    for width in widths:
        found.append(rows[:, start : start + width].square().sum(1).sqrt())
        start += width
    return torch.stack(found, dim=1)


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


def take_steps(ours: Dictionary, architecture: str, density: float, other: DenseReference, count: int = 30) -> int:
    """Steps beside dense autograd's, with equal errors; returns how many features were dead at most."""
    optimizer = FeatureAdam(ours, SETTINGS.beta1, SETTINGS.beta2)
    firing = FiringRecord(D_SAE, 4 * BATCH, torch.device("cpu"), refresh_every=1)
    weight = SETTINGS.l0_coefficient if architecture == "jumprelu" else SETTINGS.l1_coefficient
    most_dead = 0
    for step in range(1, count + 1):
        x = rows(ours.d_in, 100 + step % 10)
        context = StepInputs(
            firing.dead, firing.candidates, weight or 0.0, SETTINGS.aux_coefficient, ours.d_in // 2, density,
            optimizer.encoder_sink, optimizer.decoder_sink, bandwidth=SETTINGS.bandwidth,
        )  # fmt: skip
        most_dead = max(most_dead, len(firing.candidates))
        losses = OBJECTIVES[architecture](ours, x, x, context)
        losses.total.backward()
        optimizer.step(1e-2)
        firing.record(losses.counts, losses.l0, len(x), step)
        assert float(losses.terms["mse"]) == pytest.approx(other.step(x, 1e-2), rel=1e-9), step
    return most_dead


@pytest.mark.parametrize("dead", [0, 3, 11])
@pytest.mark.parametrize(("architecture", "density"), DENSELY)
def test_every_gradient_is_that_of_dense_autograd(architecture: str, density: float, dead: int) -> None:
    ours = crosscoder(architecture)
    is_dead = (torch.arange(D_SAE) % 4 == 1) & (torch.arange(D_SAE) < 4 * dead)
    assert int(is_dead.sum()) == dead
    reference = DenseReference(architecture, ours, SETTINGS)
    reference.silent = 4 * BATCH * is_dead
    x = rows(D_IN, 2)
    losses = OBJECTIVES[architecture](ours, x, x, inputs(architecture, is_dead, density))
    expected, mse, features = reference.loss(x)
    torch.testing.assert_close(losses.total, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.terms["mse"], mse.detach(), rtol=1e-12, atol=0)
    assert torch.equal(losses.counts, (features > 0).sum(0).to(losses.counts.dtype))
    found = gradients(losses.total, ours)
    check_same(found, gradients(expected, ours))
    assert all(bool(found[name].any()) for name in found), "a parameter has no gradient"


@pytest.mark.parametrize(("architecture", "density"), DENSELY)
def test_steps_in_float64_are_those_of_dense_autograd_and_torch_s_adam(architecture: str, density: float) -> None:
    """Thirty steps, among them ones with dead features; decoder norms of all sites add up to 1 after each."""
    ours = crosscoder(architecture)
    with torch.no_grad():
        ours.W_enc[:, :12] *= 0.2
        ours.b_enc[:12] -= 2.0 if architecture in ("relu", "gated") else 0.0
    reference = DenseReference(architecture, copy.deepcopy(ours), SETTINGS)
    assert take_steps(ours, architecture, density, reference) > 0, "no feature died, so its revival is not tested"
    for (name, found), expected in zip(ours.named_parameters(), reference.dictionary.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    sums = norms(ours.W_dec.detach(), SITES).sum(1)
    assert bool((sums - 1).abs().max() < 1e-12) == (architecture != "relu")


@pytest.mark.parametrize(("architecture", "density"), DENSELY)
def test_a_crosscoder_of_one_site_is_an_sae(architecture: str, density: float) -> None:
    """Outputs, losses and gradients are the same numbers, and training steps are equal."""
    ours = crosscoder(architecture, (D_IN,))
    plain = copy.deepcopy(ours)
    plain.frame = PLAIN
    assert ours.is_crosscoder and not plain.is_crosscoder
    x, is_dead = rows(D_IN, 4), torch.arange(D_SAE) < 5
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-10, atol=1e-10)
    context = inputs(architecture, is_dead, density)
    losses, expected = (OBJECTIVES[architecture](each, x, x, context) for each in (ours, plain))
    torch.testing.assert_close(losses.total, expected.total, rtol=1e-10, atol=0)
    check_same(gradients(losses.total, ours), gradients(expected.total, plain))
    take_steps(ours, architecture, density, DenseReference(architecture, plain, SETTINGS), count=10)


@pytest.mark.parametrize("dead", [0, 5])
@pytest.mark.parametrize(("architecture", "density"), DENSELY)
def test_the_same_site_twice_is_an_sae_with_half_the_decoder(architecture: str, density: float, dead: int) -> None:
    """The SAE's encoder on both sites gives activations twice as large, and each site has half of the SAE's decoder
    row, so that norms add up to 1 again and each site is reconstructed as by the SAE. The loss, a sum over both sites,
    is twice the SAE's in every term, and so are its gradients, by the chain rule through this map that autograd takes.

    A penalty on L0 does not double, so its weight is doubled; windows around thresholds are in units of activations.
    """
    sae, twice = crosscoder(architecture, (6,)), crosscoder(architecture, (6, 6))
    sae.frame = PLAIN
    mapped = {name: parameter if name == "r_mag" else 2 * parameter for name, parameter in sae.named_parameters()}
    mapped["W_enc"] = torch.cat([sae.W_enc, sae.W_enc])
    mapped["W_dec"] = torch.cat([sae.W_dec, sae.W_dec], dim=1) / 2
    mapped["b_dec"] = torch.cat([sae.b_dec, sae.b_dec])
    with torch.no_grad():
        for name, parameter in twice.named_parameters():
            parameter.copy_(mapped[name])
    torch.testing.assert_close(twice.decoder_norms(), sae.decoder_norms(), rtol=1e-12, atol=0)
    x = rows(6, 5)
    xx = torch.cat([x, x], dim=1)
    torch.testing.assert_close(twice.encode(xx), 2 * sae.encode(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(twice(xx), sae(x).repeat(1, 2), rtol=1e-10, atol=1e-10)
    context = inputs(architecture, torch.arange(D_SAE) < dead, density)
    doubled = replace(context, bandwidth=2 * context.bandwidth)
    if architecture == "jumprelu":
        doubled = replace(doubled, sparsity=2 * context.sparsity)
    ours, theirs = OBJECTIVES[architecture](twice, xx, xx, doubled), OBJECTIVES[architecture](sae, x, x, context)
    torch.testing.assert_close(ours.total, 2 * theirs.total, rtol=1e-10, atol=0)
    assert torch.equal(ours.counts, theirs.counts)
    of_twice = gradients(ours.total, twice)
    trained = [p for p in sae.parameters() if p.requires_grad]
    chained = torch.autograd.grad([mapped[name] for name in of_twice], trained, list(of_twice.values()))
    expected = {name: 2 * gradient for name, gradient in gradients(theirs.total, sae).items()}
    check_same(dict(zip(of_twice, chained, strict=True)), expected)


class PaperCrosscoder:
    """Minder et al. 2025, §2: f_j = ReLU(Σ_s W_enc,s x_s + b_enc), of which the largest f_j Σ_s ‖W_dec,s,j‖ of a batch
    are kept; x̂_s = f W_dec,s + b_dec,s. A matrix for each site, dense, with decoder norms of any size.

    Inputs lose b_dec,s first, as everywhere in this package; b_enc can make up for it.
    """

    def __init__(self, dictionary: Dictionary, widths: tuple[int, ...]) -> None:
        self.W_enc = [part.clone().requires_grad_() for part in dictionary.W_enc.detach().split(widths)]
        self.W_dec = [part.clone().requires_grad_() for part in dictionary.W_dec.detach().split(widths, dim=1)]
        self.b_dec = [part.clone().requires_grad_() for part in dictionary.b_dec.detach().split(widths)]
        self.b_enc = dictionary.b_enc.detach().clone().requires_grad_()
        self.parameters = [*self.W_enc, *self.W_dec, *self.b_dec, self.b_enc]

    def loss(self, xs: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
        """‖x − x̂‖² summed over sites, mean over tokens; and which features fire."""
        pre = sum((x - b) @ W for x, b, W in zip(xs, self.b_dec, self.W_enc, strict=True)) + self.b_enc
        f = pre.relu()
        worth = f * self.sums()
        fires = worth >= worth.flatten().topk(k * len(f)).values[-1]
        f = f * fires
        errors = [(x - f @ W - b).square().sum(1) for x, W, b in zip(xs, self.W_dec, self.b_dec, strict=True)]
        return sum(errors).mean(), fires & (f > 0)  # type: ignore[union-attr]

    def sums(self) -> Tensor:
        return sum(W.norm(dim=1) for W in self.W_dec)  # type: ignore[return-value]

    @torch.no_grad()
    def project(self) -> None:
        """Take from the gradient what would change Σ_s ‖W_dec,s,j‖."""
        normals = [W / W.norm(dim=1, keepdim=True) for W in self.W_dec]
        along = sum((W.grad * n).sum(1, keepdim=True) for W, n in zip(self.W_dec, normals, strict=True)) / len(normals)
        for W, normal in zip(self.W_dec, normals, strict=True):
            W.grad -= along * normal

    @torch.no_grad()
    def rescale(self) -> None:
        sums = self.sums()
        for W in self.W_dec:
            W.div_(sums[:, None])


def test_selection_by_value_is_the_paper_s_by_value_times_decoder_norms() -> None:
    """A crosscoder whose decoder norms differ by a factor of hundreds fires and reconstructs as ours does after
    `normalise_decoder_`, in which the sums of norms are 1; selection by value before it is another."""
    ours = crosscoder("batch_topk")
    factors = torch.exp(2 * torch.randn(D_SAE, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    with torch.no_grad():
        ours.W_dec *= factors[:, None]
    x = rows(D_IN, 6)
    expected, fires = PaperCrosscoder(ours, SITES).loss(list(x.split(SITES, dim=1)), K)
    context = inputs("batch_topk", torch.zeros(D_SAE, dtype=torch.bool))
    assert isinstance(ours, BatchTopK)
    assert not torch.equal(batch_topk_loss(ours, x, x, context).counts, fires.sum(0).double())
    ours.normalise_decoder_()
    losses = batch_topk_loss(ours, x, x, context)
    torch.testing.assert_close(losses.total, expected, rtol=1e-12, atol=0)
    assert torch.equal(losses.counts, fires.sum(0).double())


@pytest.fixture
def in_float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("in_float64")
def test_fifty_steps_are_those_of_the_paper_s_batch_topk() -> None:
    """Whole training steps on two sites of different scales: normalisation, schedule, Adam. Without AuxK, which is
    compared with dense autograd above; in float64, in which no two activations are nearly equal."""
    generator = torch.Generator().manual_seed(8)
    widths, batch, steps = (12, 8), 256, 50
    directions = torch.randn(40, 20, generator=generator)
    noise = torch.randn(steps, batch, 20, generator=generator)  # so that no two rows are equal
    batches = [
        (torch.rand(batch, 40, generator=generator) < 0.1).double() @ directions * 3 + part + 5 for part in noise
    ]
    xs = [[part * factor for part, factor in zip(x.split(widths, dim=1), (1, 30), strict=True)] for x in batches]
    source = JoinedSource([IterableSource([x[site] for x in xs], estimate_from=steps) for site in range(2)])
    recipe = Recipe(
        DictionaryConfig(architecture="batch_topk", d_sae=64, k=4),
        TrainConfig(tokens=steps * batch, batch_size=batch, aux_coefficient=0, center=False, encoder_dtype="float32"),
    )
    trainer = Trainer(recipe, source, None, steps, torch.device("cpu"))
    whole = [torch.cat([x[site] for x in xs]) for site in range(2)]
    scales = [(part.shape[1] / (part - part.mean(0)).square().sum(1).mean()).sqrt().float() for part in whole]
    paper, adam = None, None
    for x in xs:
        raw = torch.cat(x, dim=1)
        trainer.prepare(raw, None)
        if paper is None:
            paper = PaperCrosscoder(trainer.dictionary, widths)
            betas = recipe.settings.beta1, recipe.settings.beta2
            adam = torch.optim.Adam(paper.parameters, betas=betas)
        losses = trainer.compute(raw, None)
        trainer.finish()
        normal = [part * scale for part, scale in zip(x, scales, strict=True)]
        loss, _ = paper.loss(normal, 4)
        assert float(losses.terms["mse"]) == pytest.approx(float(loss.detach()), rel=1e-6)
        assert adam is not None
        adam.zero_grad()
        loss.backward()
        paper.project()
        for group in adam.param_groups:
            group["lr"] = trainer.optimizer.lr
        adam.step()
        paper.rescale()
    assert float(losses.terms["mse"]) < 0.7 * 20


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_the_tangent_has_no_part_that_changes_sums_of_norms(name: str) -> None:
    """By finite differences; also in rows of which sites are 0."""
    generator = torch.Generator().manual_seed(4)
    matrix = crosscoder("topk").W_dec.detach().clone()
    matrix[0] = 0
    gradient = torch.randn(matrix.shape, generator=generator, dtype=torch.float64)
    found = tangent(back_end(name), matrix, Gradient(dense=gradient), SITES).dense
    assert found is not None
    rest = gradient - found
    is_zero = norms(matrix, SITES).repeat_interleave(torch.tensor(SITES), dim=1) == 0
    torch.testing.assert_close(found[is_zero], gradient[is_zero])
    step = 1e-6 * found.masked_fill(is_zero, 0)
    change = (norms(matrix + step, SITES) - norms(matrix - step, SITES)).sum(1)
    assert float(change.abs().max()) < 1e-13
    torch.testing.assert_close((rest * found).sum(1), torch.zeros(D_SAE, dtype=torch.float64), atol=1e-12, rtol=0)
