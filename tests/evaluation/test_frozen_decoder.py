from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from sae.architectures import ARCHITECTURES, TopK
from sae.config.settings import EvaluationConfig
from sae.errors import TrainingError
from sae.evaluation import evaluate, evaluate_all
from sae.evaluation.baselines import Baseline
from sae.evaluation.frozen_decoder import train_frozen_decoders
from sae.evaluation.held_out import HeldOut, training_blocks
from sae.numerics.seeding import torch_generator
from tests.support.evaluation_cache import Fixed, make_cache, random_rows
from tests.support.fake_cache import HOOK

TRAIN = random_rows(4000, 6, 12, seed=1)
HELD_OUT = random_rows(150, 6, 9, seed=2)


def _train(folder: Path, wanted: list[Baseline], tokens: int = 4000):
    cache = make_cache(folder, HELD_OUT, TRAIN)
    return cache, train_frozen_decoders(wanted, HeldOut(cache, HOOK), tokens)


def test_the_decoder_is_random_and_the_encoder_is_trained(tmp_path: Path) -> None:
    baseline = Baseline("frozen_decoder", 3, 48, "topk")
    cache, made = _train(tmp_path, [baseline])
    x = torch.cat(list(training_blocks(cache, HOOK, 4000)))
    x_hat, codes = made[baseline](x).x_hat, made[baseline](x).codes
    assert codes is not None and int((codes.values > 0).sum(-1).max()) == 3
    # what it makes lies in the cone of directions that nobody trained: those of the generator's first draw
    drawn = torch.randn(48, 6, generator=torch_generator("initial weights: frozen decoder", 0))
    rows = torch.nn.functional.normalize(drawn, dim=-1)
    parts = (codes.values[..., None] * rows[codes.indices]).sum(1)
    offset = x_hat - parts
    assert torch.allclose(offset, offset[:1].expand_as(offset), atol=1e-4)
    variance = (x - x.mean(0)).square().sum()
    untrained = TopK(6, 48, k=3).requires_grad_(False)
    untrained.W_dec.copy_(rows)
    untrained.W_enc.copy_(rows.T)
    untrained.b_dec.copy_(x.mean(0))
    error = (x - x_hat).square().sum()
    assert error < 0.9 * (x - untrained(x)).square().sum()
    assert error < 0.9 * variance
    text = r"frozen decoder: topk, 48 random directions that stay, k = 3, its encoder trained on 3,\d{3} tokens"
    assert re.fullmatch(text, made[baseline].description)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_every_architecture_has_one(tmp_path: Path, architecture: str) -> None:
    prefixes = (0.25, 1.0) if architecture == "matryoshka" else ()
    baseline = Baseline("frozen_decoder", 3, 48, architecture, prefixes)
    _, made = _train(tmp_path, [baseline])
    assert made[baseline](torch.randn(5, 6)).x_hat.isfinite().all()
    assert f"frozen decoder: {architecture}, 48 random directions" in made[baseline].description


def test_together_they_are_what_each_is_alone(tmp_path: Path) -> None:
    wanted = [Baseline("frozen_decoder", k, 48, "topk") for k in (2, 5)]
    _, together = _train(tmp_path / "a", wanted)
    x = torch.randn(20, 6)
    for number, baseline in enumerate(wanted):
        _, alone = _train(tmp_path / str(number), [baseline])
        assert torch.equal(together[baseline](x).x_hat, alone[baseline](x).x_hat)


def test_equal_ones_are_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sae.evaluation import frozen_decoder

    trained: list[int] = []
    original = frozen_decoder.train_all

    def counting(sources, recipes, **options):
        trained.append(len(recipes))
        return original(sources, recipes, **options)

    monkeypatch.setattr(frozen_decoder, "train_all", counting)
    cache = make_cache(tmp_path, HELD_OUT, TRAIN)
    made = {str(n): TopK(6, 24, k=k).requires_grad_(False) for n, k in enumerate((2, 2, 3))}
    reports = evaluate_all(made, cache, hook=HOOK)
    assert trained == [2]
    assert reports["0"].baselines["frozen_decoder"] is reports["1"].baselines["frozen_decoder"]
    assert "k = 3" in reports["2"].baselines["frozen_decoder"].description
    left_out = evaluate_all(made, cache, hook=HOOK, settings=EvaluationConfig(frozen_decoder_tokens=0))
    assert trained == [2]
    assert list(left_out["0"].baselines) == ["pca", "random", "identity"]


def test_what_has_no_architecture_of_ours_stands_beside_topk(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, HELD_OUT, TRAIN)
    report = evaluate(Fixed(6, 5, lambda x: x), cache, hook=HOOK)
    assert report.baselines["frozen_decoder"].description.startswith("frozen decoder: topk, 5 random directions")


def test_one_that_diverges_says_how_to_leave_it_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sae.evaluation import frozen_decoder
    from sae.training import Outcome

    monkeypatch.setattr(frozen_decoder, "train_all", lambda *_, **__: Outcome({}, {"0": "NaN at step 3"}, {}))
    with pytest.raises(TrainingError, match=r"NaN at step 3; evaluation\.frozen_decoder_tokens=0 leaves it out"):
        _train(tmp_path, [Baseline("frozen_decoder", 2, 24, "topk")])
