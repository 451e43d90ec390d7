from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.activations.cache import ActivationCache
from sae.activations.tokens import eligible_rows
from sae.architectures import TopK
from sae.config.settings import EvaluationConfig
from sae.errors import CacheError, ConfigError, FormatError
from sae.evaluation import evaluate, held_out
from sae.evaluation.held_out import HeldOut, held_out_blocks
from tests.support import evaluation_reference as reference
from tests.support.evaluation_cache import Fixed, make_cache, random_rows
from tests.support.fake_cache import HOOK, POLICY

D_IN = 6
ROWS = random_rows(150, D_IN, 9)  # 18 contexts of 8, and one of 6


def _eligible(rows: tuple[Tensor, Tensor, Tensor] = ROWS) -> tuple[Tensor, Tensor]:
    x, tokens, documents = rows
    eligible = eligible_rows(tokens, POLICY, 8)
    return x[eligible], documents[eligible]


def _scores(folder: Path, reconstruct: Callable[[Tensor], Tensor], **settings: Any) -> dict[str, Any]:
    report = evaluate(
        Fixed(D_IN, 3, reconstruct), make_cache(folder, ROWS), hook=HOOK, settings=EvaluationConfig(**settings)
    )
    return report.to_json()


def _values(scores: dict[str, Any]) -> dict[str, float]:
    return {key: value["value"] for key, value in scores.items() if isinstance(value, dict) and "value" in value}


def test_mean_predictor_scores_fvu_1(tmp_path: Path) -> None:
    mean = _eligible()[0].double().mean(0)
    scores = _scores(tmp_path, lambda x: mean.expand(len(x), -1))
    assert scores["fvu"]["value"] == pytest.approx(1, abs=1e-14)
    assert scores["explained_variance"]["value"] == pytest.approx(0, abs=1e-14)


def test_identity_scores_zero_error(tmp_path: Path) -> None:
    scores = _scores(tmp_path, lambda x: x)
    expected = {
        "mse": 0,
        "fvu": 0,
        "explained_variance": 1,
        "cosine": 1,
        "l2_ratio": 1,
        "relative_reconstruction_bias": 1,
    }
    for name, value in expected.items():
        assert scores[name]["value"] == pytest.approx(value, abs=1e-14), name
        assert scores["baselines"]["identity"][name] == scores[name]


def test_mse_of_a_known_offset(tmp_path: Path) -> None:
    offset = torch.tensor([1.0, -2.0, 0.5, 0.0, 0.0, 4.0]).double()
    scores = _scores(tmp_path, lambda x: x.double() + offset)
    assert scores["mse"]["value"] == pytest.approx(21.25, rel=1e-14)
    assert scores["mse"]["standard_error"] == pytest.approx(0, abs=1e-13)


@pytest.mark.parametrize("c", [0.5, 2.0, -1.0])
def test_rescaled_input(tmp_path: Path, c: float) -> None:
    scores = _values(_scores(tmp_path, lambda x: c * x))
    x, _ = _eligible()
    x = x.double()
    assert scores["cosine"] == pytest.approx(1 if c > 0 else -1, rel=1e-14)
    assert scores["l2_ratio"] == pytest.approx(abs(c), rel=1e-14)
    assert scores["relative_reconstruction_bias"] == pytest.approx(c, rel=1e-14)
    assert scores["mse"] == pytest.approx((1 - c) ** 2 * float(x.square().sum(1).mean()), rel=1e-13)
    variance = float((x - x.mean(0)).square().sum(1).mean())
    assert scores["fvu"] == pytest.approx(scores["mse"] / variance, rel=1e-13)


@pytest.mark.parametrize("c", [0.25, 8.0])
def test_scaling_input_and_reconstruction_alike_changes_units_alone(tmp_path: Path, c: float) -> None:
    def reconstruct(x: Tensor) -> Tensor:
        return 0.7 * x + x.roll(1, -1) / 10

    once = _values(_scores(tmp_path / "once", reconstruct))
    x, tokens, documents = ROWS
    cache = make_cache(tmp_path / "scaled", (c * x, tokens, documents))  # a power of 2: exact in float32
    scaled = _values(evaluate(Fixed(D_IN, 3, reconstruct), cache, hook=HOOK).to_json())
    for name in ("fvu", "explained_variance", "cosine", "l2_ratio", "relative_reconstruction_bias"):
        assert scaled[name] == pytest.approx(once[name], rel=1e-6), name
    assert scaled["mse"] == pytest.approx(c**2 * once["mse"], rel=1e-6)


def test_every_metric_and_standard_error_equals_the_slow_reference(tmp_path: Path) -> None:
    def reconstruct(x: Tensor) -> Tensor:
        return 0.7 * x + x.roll(1, -1).square() / 10

    scores = _scores(tmp_path, reconstruct)
    x, documents = _eligible()
    expected = reference.reconstruction(x.numpy(), reconstruct(x).numpy(), documents.numpy())
    for name, (value, error) in expected.items():
        assert scores[name]["value"] == pytest.approx(value, rel=1e-12), name
        assert scores[name]["standard_error"] == pytest.approx(error, rel=1e-12), name
    assert scores["evaluated"]["tokens"] == len(x)
    assert scores["evaluated"]["masked_tokens"] == 150 - len(x)
    assert scores["evaluated"]["documents"] == len(set(documents.tolist()))


def test_a_mean_far_from_the_origin_does_not_cancel(tmp_path: Path) -> None:
    x, tokens, documents = ROWS
    far = (x + 2**16, tokens, documents)  # float32 numbers keep 2⁻⁷: the spread is there, exact in what is stored
    kept, _ = _eligible(far)
    mean = kept.double().mean(0)
    cache = make_cache(tmp_path, far)
    report = evaluate(Fixed(D_IN, 3, lambda x: mean.expand(len(x), -1)), cache, hook=HOOK)
    assert report.scores.reconstruction.fvu.value == pytest.approx(1, abs=1e-12)


def test_zero_vectors_leave_numbers_defined(tmp_path: Path) -> None:
    x, tokens, documents = (part.clone() for part in ROWS)
    zero = eligible_rows(tokens, POLICY, 8).nonzero().flatten()[:5]
    x[zero] = 0
    cache = make_cache(tmp_path, (x, tokens, documents))
    scores = evaluate(Fixed(D_IN, 3, lambda x: 2 * x), cache, hook=HOOK).to_json()
    assert scores["cosine"]["value"] == pytest.approx(1, rel=1e-14)
    assert scores["l2_ratio"]["value"] == pytest.approx(2, rel=1e-14)
    nothing = evaluate(Fixed(D_IN, 3, torch.zeros_like), cache, hook=HOOK).to_json()
    assert (nothing["cosine"]["value"], nothing["l2_ratio"]["value"]) == (0, 0)
    assert not any(nothing["relative_reconstruction_bias"].values())


def test_masked_positions_count_nowhere(tmp_path: Path) -> None:
    x, tokens, documents = ROWS
    garbage = x.clone()
    masked = ~eligible_rows(tokens, POLICY, 8)
    garbage[masked] = 1e4 * torch.randn(int(masked.sum()), D_IN, generator=torch.Generator().manual_seed(1))
    dictionary = _random_topk()
    clean = evaluate(dictionary, make_cache(tmp_path / "a", ROWS), hook=HOOK).to_json()
    dirty = evaluate(dictionary, make_cache(tmp_path / "b", (garbage, tokens, documents)), hook=HOOK).to_json()
    assert clean["activation_norms"]["masked"] != dirty["activation_norms"]["masked"]
    for scores in (clean, dirty):  # other packages mask by id alone
        scores.pop("seconds"), scores.pop("activation_norms"), scores.pop("legacy")
    assert clean == dirty


def _random_topk(dtype: torch.dtype = torch.float32) -> TopK:
    dictionary = TopK(D_IN, 24, k=3).requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    dictionary.W_dec.copy_(torch.nn.functional.normalize(torch.randn(24, D_IN, generator=generator), dim=-1))
    dictionary.W_enc.copy_(dictionary.W_dec.T)
    dictionary.b_dec.fill_(5.0)
    return dictionary.to(dtype)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks small enough for a test's cache to have several."""
    monkeypatch.setattr(held_out, "BLOCK_TOKENS", 100)
    return 100


def test_blocks_are_the_same_however_the_cache_is_read(tmp_path: Path, small_blocks: int) -> None:
    rows = random_rows(377, D_IN, 20)
    cache = make_cache(tmp_path, rows)
    x, documents = _eligible(rows)
    for batch_contexts in (1, 3, 16, 10_000):
        blocks = list(held_out_blocks(HeldOut(cache, HOOK, EvaluationConfig(batch_contexts=batch_contexts))))
        assert [len(block.x) for block in blocks[:-1]] == [small_blocks] * (len(blocks) - 1)
        assert torch.equal(torch.cat([block.x for block in blocks]), x)
        assert torch.equal(torch.cat([block.documents for block in blocks]), documents)


@pytest.mark.usefixtures("small_blocks")
def test_batch_size_changes_nothing(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, random_rows(377, D_IN, 20))
    reports = [
        evaluate(_random_topk(), cache, hook=HOOK, settings=EvaluationConfig(batch_contexts=n)).to_json()
        for n in (1, 3, 16)
    ]
    for report in reports:
        report.pop("seconds"), report.pop("settings")
    first = _flat(reports[0])
    for other in map(_flat, reports[1:]):
        assert other == pytest.approx(first, rel=1e-12)


@pytest.mark.usefixtures("small_blocks")
def test_order_of_contexts_changes_nothing(tmp_path: Path) -> None:
    x, tokens, documents = (part.view(-1, 8, *part.shape[1:]) for part in random_rows(400, D_IN, 20))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    straight = (x.flatten(0, 1), tokens.flatten(), documents.flatten())
    shuffled = (x[order].flatten(0, 1), tokens[order].flatten(), documents[order].flatten())
    scores = [
        evaluate(_random_topk(torch.float64), make_cache(tmp_path / name, rows, straight), hook=HOOK).to_json()
        for name, rows in (("a", straight), ("b", shuffled))
    ]
    for name in ("mse", "fvu", "cosine", "l2_ratio", "relative_reconstruction_bias", "l0", "l1"):
        assert scores[1][name] == pytest.approx(scores[0][name], rel=1e-12), name
    assert scores[1]["density"] == scores[0]["density"]


def test_each_document_twice_leaves_values_and_shrinks_errors(tmp_path: Path) -> None:
    x, tokens, documents = (part[:144] for part in ROWS)
    twice = (torch.cat([x, x]), torch.cat([tokens, tokens]), torch.cat([documents, documents + 9]))
    once = evaluate(_random_topk(), make_cache(tmp_path / "a", (x, tokens, documents)), hook=HOOK).scores
    double = evaluate(_random_topk(), make_cache(tmp_path / "b", twice), hook=HOOK).scores
    n = len(set(documents.tolist()))
    for name in ("mse", "fvu", "cosine", "relative_reconstruction_bias"):
        one, two = getattr(once.reconstruction, name), getattr(double.reconstruction, name)
        assert two.value == pytest.approx(one.value, rel=1e-7), name
        shrink = ((n - 1) / (2 * n - 1)) ** 0.5  # for documents of one length; these are of several
        assert two.standard_error == pytest.approx(one.standard_error * shrink, rel=0.15), name


def test_each_token_twice_in_its_document_leaves_values_and_errors(tmp_path: Path) -> None:
    """Means, ratios and their errors over documents: a document that says everything twice is no more evidence."""
    x, tokens, documents = (part[:144].view(18, 8, *part.shape[1:]) for part in ROWS)
    straight = tuple(part.flatten(0, 1) for part in (x, tokens, documents))
    doubled = tuple(part.repeat_interleave(2, 0).flatten(0, 1) for part in (x, tokens, documents))
    once, twice = (
        evaluate(_random_topk(torch.float64), make_cache(tmp_path / name, rows, straight), hook=HOOK).to_json()
        for name, rows in (("a", straight), ("b", doubled))
    )
    assert twice["evaluated"]["tokens"] == 2 * once["evaluated"]["tokens"]
    names = ("mse", "fvu", "explained_variance", "cosine", "l2_ratio", "relative_reconstruction_bias", "l0", "l1")
    for name in names:
        assert twice[name] == pytest.approx(once[name], rel=1e-10), name
    assert twice["density"]["mean"] == pytest.approx(once["density"]["mean"], rel=1e-12)
    assert twice["dead"]["features"] == once["dead"]["features"]


def test_token_limit_and_one_document(tmp_path: Path) -> None:
    x, tokens, _ = ROWS
    cache = make_cache(tmp_path, (x, tokens, torch.zeros(150)))
    scores = evaluate(_random_topk(), cache, hook=HOOK, settings=EvaluationConfig(tokens=20)).to_json()
    assert scores["evaluated"]["tokens"] + scores["evaluated"]["masked_tokens"] == 16
    assert scores["mse"]["value"] > 0 and scores["mse"]["standard_error"] is None


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "a", ROWS)
    with pytest.raises(ConfigError, match=r"evaluation\.tokens=7: less than one context of 8 tokens; set at least 8"):
        evaluate(_random_topk(), cache, hook=HOOK, settings=EvaluationConfig(tokens=7))
    with pytest.raises(ConfigError, match="activations have 6 numbers, the dictionary takes 7"):
        evaluate(TopK(7, 9, k=2), cache, hook=HOOK)
    with pytest.raises(CacheError, match=r"hook 'blocks\.9\.hook_resid_pre' is not in it"):
        evaluate(_random_topk(), cache, hook="blocks.9.hook_resid_pre")
    elsewhere = _random_topk()
    elsewhere.metadata["hook"] = "blocks.0.hook_resid_pre"
    with pytest.raises(ConfigError, match=r"was trained on 'blocks\.0\.hook_resid_pre'"):
        evaluate(elsewhere, cache, hook=HOOK)
    other_model = _random_topk()
    other_model.metadata["model"] = {"weights_sha256": "abc", "weight_processing": "none"}
    with pytest.raises(CacheError, match="not the dictionary's model: weights_sha256 is '0' there and 'abc'"):
        evaluate(other_model, cache, hook=HOOK)
    broken = _random_topk()
    broken.b_enc[3] = float("nan")
    with pytest.raises(FormatError, match="b_enc has values that are infinite or not a number"):
        evaluate(broken, cache, hook=HOOK)
    x = ROWS[0].clone()
    x[1, 2] = float("inf")
    with pytest.raises(
        CacheError,
        match=r"1 of 20 tokens .* infinite or not-a-number .* \(stored as float32\); check the model's weights",
    ):
        evaluate(_random_topk(), _infinite(tmp_path / "b", x), hook=HOOK, settings=EvaluationConfig(batch_contexts=7))
    all_masked = make_cache(tmp_path / "c", (ROWS[0], torch.zeros(150), ROWS[2]), ROWS)
    with pytest.raises(ConfigError, match="all 150 held-out tokens read are masked by the token policy"):
        evaluate(_random_topk(), all_masked, hook=HOOK)


def _infinite(folder: Path, x: Tensor) -> ActivationCache:
    tokens = ROWS[1].clone()
    tokens[1] = 1
    return make_cache(folder, (x, tokens, ROWS[2]), ROWS)


def _flat(scores: Any, prefix: str = "") -> dict[str, float]:
    """Every number of nested JSON."""
    items = scores.items() if isinstance(scores, dict) else enumerate(scores) if isinstance(scores, list) else ()
    numbers = {prefix: float(scores)} if isinstance(scores, (int, float)) else {}
    return {**numbers, **{key: v for name, value in items for key, v in _flat(value, f"{prefix}.{name}").items()}}
