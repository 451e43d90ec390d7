"""Many dictionaries from one pass: each as if it were alone, one reading, a common end, and one that fails alone."""

from __future__ import annotations

import itertools
import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sae.architectures import ARCHITECTURES
from sae.config.settings import DictionaryConfig
from sae.dictionary.base import Dictionary
from sae.errors import ConfigError, TrainingError
from sae.training import IterableSource, Recipe, TrainingInterrupted, train, train_all
from sae.training.checkpoint import list_checkpoints
from sae.training.schedules import FALL, START_L0, Gains, SteeredWeight, falling_l0
from sae.training.threshold import rows_for_threshold
from sae.training.trainer import Trainer
from tests.support.quick import quick_for
from tests.training.test_loop import BATCH, D_IN, D_SAE, K, fvu, planted, settings


def recipe(
    architecture: str, folder: Path | None = None, seed: int = 0, d_sae: int = D_SAE, **changes: object
) -> Recipe:
    shape = DictionaryConfig(architecture=architecture, d_sae=d_sae, k=K)  # type: ignore[arg-type]
    return Recipe(shape, settings(60, **changes), seed, folder=folder)


class Counted:
    """Batches that know how often each was asked for."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches, self.read = batches, 0

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.batches:
            self.read += 1
            yield batch


def test_each_is_what_it_would_be_alone_and_every_batch_is_read_once() -> None:
    data = Counted(planted(100))
    source = IterableSource(data)
    read_before = data.read
    recipes = {name: recipe(name) for name in ARCHITECTURES}
    recipes |= {"another seed": recipe("topk", seed=1), "wider": recipe("topk", d_sae=2 * D_SAE)}
    outcome = train_all({"activations": source}, recipes)
    ahead = rows_for_threshold(K) // BATCH  # read before their steps are due, at the end after the last
    assert data.read - read_before == 60 + ahead
    assert outcome.failures == {}
    for name, made in recipes.items():
        alone = train(IterableSource(planted(100)), made.dictionary, made.settings, seed=made.seed)
        for label, parameter in alone.named_parameters():
            assert torch.equal(outcome.dictionaries[name].get_parameter(label), parameter), (name, label)
    assert not torch.equal(outcome.dictionaries["topk"].W_dec, outcome.dictionaries["another seed"].W_dec)
    assert all(cost.seconds > 0 and cost.tokens == 60 * BATCH for cost in outcome.costs.values())
    # Weights and two moments of each, in float32.
    assert outcome.costs["topk"].bytes == 3 * 4 * (2 * D_IN * D_SAE + D_SAE + D_IN)


def test_one_that_diverges_drops_out_and_the_others_go_on(tmp_path: Path) -> None:
    recipes = {
        "bad": recipe("topk", tmp_path / "bad", lr=1e30),
        "good": recipe("topk", tmp_path / "good"),
    }
    outcome = train_all({"activations": IterableSource(planted(100))}, recipes)
    assert set(outcome.dictionaries) == {"good"}
    assert "training diverged; lower train.lr (now 1e+30); there is no checkpoint yet" in outcome.failures["bad"]
    alone = train(IterableSource(planted(100)), recipes["good"].dictionary, recipes["good"].settings)
    assert torch.equal(outcome.dictionaries["good"].W_dec, alone.W_dec)


SCRIPT = """
import os, signal, sys, torch
from pathlib import Path
from sae.kernels import products
from sae.training import train_all, IterableSource
products.cpu_has_bfloat16 = lambda: False  # as in the tests' own process
from sae.architectures import ARCHITECTURES
from tests.training.test_many import planted, recipe
folder = Path(sys.argv[1])

class Killing(list):
    count = 0
    def __iter__(self):
        for batch in list.__iter__(self):
            Killing.count += 1
            if Killing.count == int(sys.argv[2]):
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

train_all({"activations": IterableSource(Killing(planted(100)))}, {n: recipe(n, folder / n) for n in ARCHITECTURES})
"""


@pytest.mark.slow
def test_killed_in_the_middle_and_resumed_gives_the_same_weights(tmp_path: Path) -> None:
    ahead = rows_for_threshold(K) // BATCH
    count = 8 + 40 + ahead  # those of the statistics, those of the steps, those read for the threshold of step 40
    killed = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(count)], check=False, cwd=Path(__file__).parents[2]
    )
    assert killed.returncode == -signal.SIGKILL
    assert all(list_checkpoints(tmp_path / name / "checkpoints") for name in ARCHITECTURES)
    seen: list[int] = []
    resumed = train_all(
        {"activations": IterableSource(planted(100))}, {name: recipe(name, tmp_path / name) for name in ARCHITECTURES},
        progress=lambda done, of, metrics: seen.append(done // BATCH),
    )  # fmt: skip
    assert seen == [30, 40, 50, 60], "it did not go on from step 25"
    whole = train_all({"activations": IterableSource(planted(100))}, {name: recipe(name) for name in ARCHITECTURES})
    for name, dictionary in whole.dictionaries.items():
        for label, parameter in dictionary.named_parameters():
            assert torch.equal(resumed.dictionaries[name].get_parameter(label), parameter), (name, label)


def test_where_a_kill_left_checkpoints_of_two_steps_the_common_one_is_taken(tmp_path: Path) -> None:
    recipes = {name: recipe(name, tmp_path / name, keep_checkpoints=5) for name in ("topk", "jumprelu")}
    whole = train_all({"activations": IterableSource(planted(100))}, recipes)
    for name in ("step-00000050", "step-00000060"):
        (tmp_path / "topk" / "checkpoints" / name / "state.pt").unlink()
    seen: list[int] = []
    again = train_all(
        {"activations": IterableSource(planted(100))}, recipes,
        progress=lambda done, of, metrics: seen.append(done // BATCH),
    )  # fmt: skip
    assert seen == [30, 40, 50, 60]
    for name, dictionary in whole.dictionaries.items():
        for label, parameter in dictionary.named_parameters():
            assert torch.equal(again.dictionaries[name].get_parameter(label), parameter), (name, label)


def test_ctrl_c_saves_all(tmp_path: Path) -> None:
    recipes = {name: recipe(name, tmp_path / name) for name in ("topk", "relu")}

    def stop(done: int, of: int, metrics: object) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(TrainingInterrupted, match=r"stopped at step 10 of 60; .* and 1 more: run the same command"):
        train_all({"activations": IterableSource(planted(100))}, recipes, progress=stop)
    for name in recipes:
        assert [path.name for path in list_checkpoints(tmp_path / name / "checkpoints")] == ["step-00000010"]


def test_a_transcoder_learns_another_stream_row_by_row() -> None:
    """Targets are a rotation of the inputs, scaled and shifted; what is saved maps raw to raw."""
    data = planted(100)
    rotation = torch.linalg.qr(torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(5))).Q
    targets = [20.0 * x @ rotation + 3.0 for x in data]
    made = train(
        IterableSource(data), DictionaryConfig(d_sae=D_SAE, k=K), settings(900, lr=3e-3),
        target=IterableSource(targets),
    )  # fmt: skip
    x, y = torch.cat(data), torch.cat(targets)
    assert float((y - made(x)).square().sum() / (y - y.mean(0)).square().sum()) < 0.1


def test_a_transcoder_resumes_and_is_not_mistaken_for_an_autoencoder(tmp_path: Path) -> None:
    data = planted(100)
    shape, chosen = DictionaryConfig(d_sae=D_SAE, k=K), settings(60, center=True)

    def made(folder: Path | None, **how: object) -> Dictionary:
        other = IterableSource([3.0 * x.flip(1) + 1.0 for x in data])
        return train(IterableSource(data), shape, chosen, target=other, folder=folder, **how)  # type: ignore[arg-type]

    def stop(done: int, of: int, metrics: object) -> None:
        if done == 30 * BATCH:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(TrainingInterrupted):
        made(tmp_path, progress=stop)
    with pytest.raises(TrainingError, match=r"made with target=.*, now None"):
        train(IterableSource(data), shape, chosen, folder=tmp_path)
    seen: list[int] = []
    whole, resumed = made(None), made(tmp_path, progress=lambda done, of, metrics: seen.append(done // BATCH))
    assert seen == [40, 50, 60]
    for label, parameter in whole.named_parameters():
        assert torch.equal(resumed.get_parameter(label), parameter), label


@pytest.mark.parametrize("architecture", quick_for(["relu"], ["relu", "gated", "jumprelu"]))
def test_penalties_are_steered_to_the_l0_that_was_asked_for(architecture: str) -> None:
    data = planted(100)
    shape = DictionaryConfig(architecture=architecture, d_sae=D_SAE, k=K)  # type: ignore[arg-type]
    dictionary = train(IterableSource(data), shape, settings(700, lr=3e-3))
    l0 = float((dictionary.encode(torch.cat(data)) > 0).sum(1).float().mean())
    assert l0 == pytest.approx(K, rel=0.1)
    assert fvu(dictionary, torch.cat(data)) < 0.3


def test_a_steered_weight_stands_still_only_at_its_target() -> None:
    weight = SteeredWeight(8.0, start=3.0, device=torch.device("cpu"), gains=Gains(2.0, 0.1, 1))
    assert float(weight.value) == pytest.approx(3.0)
    weight.observe(torch.tensor(8.0))
    assert float(weight.value) == pytest.approx(3.0)
    weight.observe(torch.tensor(8.0 * 2.718281828**0.5))  # e = 0.5
    assert float(weight.value) == pytest.approx(3.0 * 2.718281828 ** (0.1 * 0.5 + 2.0 * 0.5), rel=1e-5)
    weight.observe(torch.tensor(0.0))  # e is −1 at the least
    assert float(weight.value) == pytest.approx(3.0 * 2.718281828 ** (0.1 * 0.5 - 0.1 - 2.0), rel=1e-5)


def test_a_steered_weight_begins_with_what_the_biases_stand_for() -> None:
    """min over f of (z − f)² + λ f is ReLU(z − λ/2): biases of −1.8 on average go with λ = 3.6."""
    weight = SteeredWeight(8.0, start=3.0, device=torch.device("cpu"), gains=Gains(2.0, 0.03, 10))
    weight.begin(torch.tensor([-1.7, -1.9]))
    assert float(weight.value) == pytest.approx(3.6)
    weight.begin(torch.tensor([0.5, -0.1]))  # no λ stands for a bias above 0
    assert float(weight.value) == pytest.approx(3.6)


@pytest.mark.parametrize("architecture", ["relu", "gated"])
def test_the_first_weight_of_training_is_twice_the_bound_where_k_fire(architecture: str) -> None:
    """The first batch has the L0 aimed at, but for the pair at the bound itself, so it hardly changes the weight."""
    x = planted(1)[0]
    shape = DictionaryConfig(architecture=architecture, d_sae=D_SAE, k=K)  # type: ignore[arg-type]
    trainer = Trainer(Recipe(shape, settings(1, lr=1e-9)), IterableSource([x]), None, 1, torch.device("cpu"))
    trainer.step(x, None)
    assert trainer.steered is not None
    bound = -float(trainer.dictionary.b_enc.detach().mean())
    assert float(trainer.steered.integral.exp()) == pytest.approx(2 * bound, rel=1e-3)


def test_the_l0_that_relu_aims_at_falls_in_equal_ratios() -> None:
    aimed = [falling_l0(step, 1000, 8, 1000, 0.4) for step in range(1000)]
    assert aimed[0] == START_L0 * 8 and aimed[400:] == [8.0] * 600
    assert all(later / sooner == pytest.approx(START_L0**-0.0025) for sooner, later in itertools.pairwise(aimed[:401]))
    assert falling_l0(0, 100, 8, 1000, 0.2) == pytest.approx(8 * math.exp(20 * FALL))  # no faster than can be followed
    assert falling_l0(0, 1000, 8, 80, 0.4) == 20  # a quarter of all features
    assert falling_l0(0, 1000, 8, 20, 0.4) == 8  # never fewer than k
    assert falling_l0(0, 1000, 8, 1000, 0.0) == 8


def test_relu_begins_with_more_than_k_and_has_k_when_the_share_of_the_steps_is_over() -> None:
    data, seen = planted(100), {}
    shape = DictionaryConfig(architecture="relu", d_sae=D_SAE, k=K)
    train(
        IterableSource(data), shape, settings(1000, log_every=10, lr=3e-3, sparsity_warmup_fraction=0.5),
        progress=lambda done, of, metrics: seen.update({done // BATCH: metrics["l0"]}),
    )  # fmt: skip
    assert seen[10] > 0.75 * START_L0 * K
    assert seen[250] == pytest.approx(START_L0**0.5 * K, rel=0.15)  # half of the way
    assert seen[700] == pytest.approx(K, rel=0.1)


@pytest.mark.parametrize("of", ["topk", "relu"])
def test_relu_that_starts_from_a_dictionary_does_not_begin_with_more_than_k(of: str) -> None:
    """That would undo what it has learned: begun with another ReLU it keeps its biases, else k features fire."""
    data = planted(100)
    trained = settings(300, lr=3e-3, sparsity_warmup_fraction=0.0) if of == "relu" else settings(300)
    start = train(IterableSource(data), DictionaryConfig(architecture=of, d_sae=D_SAE, k=K), trained)  # type: ignore[arg-type]
    shape = DictionaryConfig(architecture="relu", d_sae=D_SAE, k=2 * K)
    l0 = []
    for begun_with in (start, None):
        recipe = Recipe(shape, settings(3000, lr=1e-9), start=begun_with)
        trainer = Trainer(recipe, IterableSource(data), None, 3000, torch.device("cpu"))
        l0.append(float(trainer.step(data[0], None).l0))
    own = float((start.encode(data[0]) > 0).sum(1).float().mean())
    assert l0[0] == pytest.approx(own if of == "relu" else 2 * K, rel=0.02)
    assert l0[1] > 1.9 * 2 * K


def test_the_rate_falls_with_the_length_where_nobody_sets_it() -> None:
    def rate(steps: int) -> float:
        return Trainer(recipe("topk"), IterableSource(planted(10)), None, steps, torch.device("cpu")).rate

    assert rate(8000) == pytest.approx(rate(2000) / 2)


def test_relu_whose_biases_are_frozen_begins_with_k() -> None:
    """They could not follow an L0 that falls."""
    data = planted(1)
    recipe = Recipe(DictionaryConfig(architecture="relu", d_sae=D_SAE, k=K), settings(3000, freeze=("b_enc",)))
    trainer = Trainer(recipe, IterableSource(data), None, 3000, torch.device("cpu"))
    assert float(trainer.step(data[0], None).l0) == pytest.approx(K, rel=0.02)


def test_what_one_pass_cannot_have_is_refused() -> None:
    source = IterableSource(planted(10))
    with pytest.raises(ConfigError, match="there is no source 'mlp'; the sources are activations"):
        train_all({"activations": source}, {"a": Recipe(DictionaryConfig(d_sae=D_SAE, k=K), settings(5), source="mlp")})
    with pytest.raises(ConfigError, match=r"train\.tokens is 320 for a and 640 for b: one pass has a single value"):
        train_all(
            {"activations": source},
            {
                "a": Recipe(DictionaryConfig(d_sae=D_SAE, k=K), settings(5)),
                "b": Recipe(DictionaryConfig(d_sae=D_SAE, k=K), settings(10)),
            },
        )
    with pytest.raises(ConfigError, match="two recipes have the same folder"):
        train_all({"activations": source}, {"a": recipe("topk", Path("x")), "b": recipe("relu", Path("x"))})
    for changes, message in (
        (
            {"architecture": "matryoshka", "prefixes": (0.5,)},
            r"dictionary\.prefixes=\[0.5\]: expected ascending shares",
        ),
        ({"k": 2 * D_SAE}, r"dictionary\.k=\d+ exceeds dictionary\.d_sae"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(source, DictionaryConfig.model_validate({"d_sae": D_SAE, "k": K, **changes}), settings(5))
    with pytest.raises(ConfigError, match=r"train\.warmup_fraction \+ train\.decay_fraction exceed 1"):
        train(source, DictionaryConfig(d_sae=D_SAE, k=K), settings(5, warmup_fraction=0.6, decay_fraction=0.6))
    with pytest.raises(ConfigError, match="there is no recipe"):
        train_all({"activations": source}, {})


def test_recipes_without_a_common_step_lose_nothing(tmp_path: Path) -> None:
    source = IterableSource(planted(100))
    train_all({"activations": source}, {"old": recipe("topk", tmp_path / "old")})
    recipes = {"old": recipe("topk", tmp_path / "old"), "new": recipe("relu", tmp_path / "new")}
    with pytest.raises(TrainingError, match="old: there are checkpoints, but of no step that all 2 have"):
        train_all({"activations": IterableSource(planted(100))}, recipes)
    assert len(list_checkpoints(tmp_path / "old" / "checkpoints")) == 2


def test_a_member_of_a_pass_goes_on_alone(tmp_path: Path) -> None:
    """The source has another name then."""
    recipes = {name: recipe(name, tmp_path / name) for name in ("topk", "gated")}

    def stop(done: int, of: int, metrics: object) -> None:
        if done == 30 * BATCH:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(TrainingInterrupted):
        train_all({"activations": IterableSource(planted(100))}, recipes, progress=stop)
    seen: list[int] = []
    alone = train(
        IterableSource(planted(100)), recipes["gated"].dictionary, recipes["gated"].settings,
        folder=tmp_path / "gated", progress=lambda done, of, metrics: seen.append(done // BATCH),
    )  # fmt: skip
    assert seen == [40, 50, 60]
    whole = train(IterableSource(planted(100)), recipes["gated"].dictionary, recipes["gated"].settings)
    for label, parameter in whole.named_parameters():
        assert torch.equal(alone.get_parameter(label), parameter), label


def test_a_source_makes_its_iterator_in_the_callers_mode() -> None:
    """Also one whose `__iter__` is an ordinary function, which runs when the loop asks for it."""
    rows, modes = planted(6), []

    class Asked(IterableSource):
        def __iter__(self) -> Iterator[torch.Tensor]:
            modes.append(torch.is_grad_enabled())
            return super().__iter__()

    with torch.no_grad():
        train(Asked(rows), DictionaryConfig(d_sae=D_SAE, k=K), settings(4))
    assert modes == [False]
