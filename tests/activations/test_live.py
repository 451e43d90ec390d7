"""Live training: the same rows in the same order as from a cache, exact resumption, one pass for all hook points."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sae.activations import ActivationCache
from sae.activations.harvest import harvest
from sae.activations.live import LivePass, LiveSource
from sae.activations.loader import ActivationLoader
from sae.activations.manifest import MANIFEST
from sae.activations.tokens import TokenStore
from sae.config.settings import RunConfig
from sae.config.splits import HELD_OUT, TRAIN
from sae.errors import CacheError, ConfigError, TrainingInterrupted
from sae.files.reading import read_object
from sae.model.language_model import LanguageModel

HOOKS = ["blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out"]
TinyConfig = Callable[..., RunConfig]


@pytest.fixture
def config(tiny_config: TinyConfig) -> RunConfig:
    """4,101 tokens in 33 shards, the last of 5 tokens; 512 of them stored."""
    return tiny_config(harvest__hooks=HOOKS, harvest__live=True, harvest__sample_tokens=500, data__tokens=4101)


@pytest.fixture
def live_cache(config: RunConfig, language_model: LanguageModel) -> ActivationCache:
    return harvest(config, language_model)


@pytest.fixture
def whole_cache(tiny_config: TinyConfig, language_model: LanguageModel, tmp_path: Path) -> ActivationCache:
    """The same text, with all activations."""
    whole = tiny_config(harvest__hooks=HOOKS, data__tokens=4101, harvest__cache=str(tmp_path / "whole"))
    return harvest(whole, language_model)


def made(cache: ActivationCache, language_model: LanguageModel, hooks: list[str] = HOOKS, **options: int) -> LivePass:
    return LivePass(
        cache, language_model, hooks,
        **{"batch_size": 50, "pool_tokens": 500, "batch_contexts": 3, "seed": 4, **options},  # type: ignore[arg-type]
    )  # fmt: skip


def drawn(source: LiveSource | ActivationLoader, batches: int) -> Tensor:
    return torch.cat([batch.float() for batch in itertools.islice(source, batches)])


class Passes:
    """Counts the model's passes."""

    def __init__(self, language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens = 0
        forward = language_model.activations

        def counted(tokens: Tensor, hooks: list[str]) -> dict[str, Tensor]:
            self.tokens += tokens.numel()
            return forward(tokens, hooks)

        monkeypatch.setattr(language_model, "activations", counted)


@pytest.mark.parametrize("pool_tokens", [16, 333, 10**6])
def test_rows_and_order_are_those_of_a_cache(
    live_cache: ActivationCache, whole_cache: ActivationCache, language_model: LanguageModel, pool_tokens: int
) -> None:
    live = made(live_cache, language_model, pool_tokens=pool_tokens)
    for hook in HOOKS:
        options = {"batch_size": 50, "pool_tokens": pool_tokens, "seed": 4, "block_tokens": 16}
        loader = ActivationLoader(whole_cache, hook, **options)  # type: ignore[arg-type]
        assert live.sources[hook].tokens_per_epoch == loader.tokens_per_epoch
        batches = 2 * loader.tokens_per_epoch // 50 + 1  # into the third epoch
        torch.testing.assert_close(drawn(live.sources[hook], batches), drawn(loader, batches), rtol=1e-4, atol=1e-5)


def test_one_pass_of_the_model_serves_all_hook_points(
    live_cache: ActivationCache, language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Passes(language_model, monkeypatch)
    live = made(live_cache, language_model)
    batches = live.order.tokens_per_epoch // 50
    for _ in zip(*(itertools.islice(live.sources[hook], batches) for hook in HOOKS), strict=True):
        pass
    assert passes.tokens == 4101
    assert live.sources[HOOKS[0]].pool_bytes == 500 * 32 * 4


def test_a_source_left_behind_is_read_from_its_own_place(
    live_cache: ActivationCache, language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae.activations.live._KEPT_BATCHES", 5)
    expected = drawn(made(live_cache, language_model, hooks=HOOKS[1:]).sources[HOOKS[1]], 40)
    live = made(live_cache, language_model)
    drawn(live.sources[HOOKS[0]], 20)
    assert torch.equal(drawn(live.sources[HOOKS[1]], 40), expected)


@pytest.mark.parametrize("used", [0, 1, 9, 10, 77, 78])
def test_a_state_continues_with_the_same_bits(
    live_cache: ActivationCache, language_model: LanguageModel, used: int
) -> None:
    whole = drawn(made(live_cache, language_model).sources[HOOKS[0]], 90)
    first = made(live_cache, language_model).sources[HOOKS[0]]
    drawn(first, used) if used else None
    resumed = made(live_cache, language_model).sources[HOOKS[0]]
    resumed.load_state_dict(first.state_dict())
    assert torch.equal(drawn(resumed, 90 - used), whole[used * 50 :])
    resumed.restart()
    assert torch.equal(drawn(resumed, 3), whole[:150])


def test_a_batch_stays_as_it_is_while_the_pool_is_filled_again(
    live_cache: ActivationCache, language_model: LanguageModel
) -> None:
    kept = list(itertools.islice(made(live_cache, language_model, pool_tokens=60).sources[HOOKS[0]], 30))
    again = made(live_cache, language_model, pool_tokens=60).sources[HOOKS[0]]
    for batch, copy in zip(kept, (x.clone() for x in itertools.islice(again, 30)), strict=True):
        assert torch.equal(batch, copy)


def test_a_model_of_its_own_device_fills_the_next_pool_beside(
    live_cache: ActivationCache, language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = drawn(made(live_cache, language_model).sources[HOOKS[0]], 90)
    monkeypatch.setattr(LivePass, "prefetches", True)
    live = made(live_cache, language_model)
    assert torch.equal(drawn(live.sources[HOOKS[0]], 90), expected)
    assert live.sources[HOOKS[0]].pool_bytes == 2 * 500 * 32 * 4


def test_stopping_keeps_the_place(live_cache: ActivationCache, language_model: LanguageModel) -> None:
    source = made(live_cache, language_model).sources[HOOKS[0]]
    expected = drawn(made(live_cache, language_model).sources[HOOKS[0]], 30)
    seen = drawn(source, 8)
    asked = iter([False] * 7)
    source.stop_when(lambda: next(asked, True))
    with pytest.raises(TrainingInterrupted):
        drawn(source, 20)
    assert source.position % 50 == 0
    done = source.position // 50
    assert done >= len(seen) // 50
    source.stop_when(lambda: False)
    assert torch.equal(drawn(source, 30 - done), expected[done * 50 :])


def test_filling_the_pool_is_shown(live_cache: ActivationCache, language_model: LanguageModel) -> None:
    live = made(live_cache, language_model, batch_contexts=30)
    shown: list[tuple[int, int]] = []
    live.progress = lambda done, total: shown.append((done, total))
    drawn(live.sources[HOOKS[0]], 1)
    [size] = {total for _, total in shown}
    assert 400 < size <= 500
    assert len(shown) == 2
    assert 400 < shown[0][0] <= 450
    assert shown[1][0] == size


@pytest.mark.parametrize(("dtype", "pool"), [("float16", torch.float16), ("int8", torch.bfloat16)])
def test_batches_have_the_number_type_of_the_cache(
    tiny_config: TinyConfig, language_model: LanguageModel, dtype: str, pool: torch.dtype
) -> None:
    cache = harvest(tiny_config(harvest__dtype=dtype, harvest__live=True), language_model)
    [source] = made(cache, language_model, hooks=[cache.hooks[0]]).sources.values()
    assert next(iter(source)).dtype == pool
    assert source.pool_bytes == 500 * 32 * 2


def test_what_cannot_be_used_is_refused(
    live_cache: ActivationCache, language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"train.pool_tokens=15: less than a context of 16 tokens"):
        made(live_cache, language_model, pool_tokens=15)
    with pytest.raises(CacheError, match="not in it; it holds"):
        made(live_cache, language_model, hooks=["blocks.0.hook_resid_pre"])
    forward = language_model.activations
    monkeypatch.setattr(
        language_model, "activations", lambda *a: {hook: x / 0 for hook, x in forward(*a).items()}
    )  # fmt: skip
    with pytest.raises(CacheError, match="not finite"):
        drawn(made(live_cache, language_model).sources[HOOKS[0]], 1)


def test_what_a_live_harvest_stores(
    live_cache: ActivationCache, whole_cache: ActivationCache, config: RunConfig
) -> None:
    """All tokens; the activations of held-out tokens, and of a sample spread over the text."""
    manifest = live_cache.manifest
    assert read_object(live_cache.path / MANIFEST)["format_version"] == 2
    assert read_object(whole_cache.path / MANIFEST)["format_version"] == 1
    assert manifest.stored == {TRAIN: [0, 8, 16, 24], HELD_OUT: [0, 1]}
    assert live_cache.is_live
    assert not whole_cache.is_live
    assert "live, 512 train tokens stored" in repr(live_cache)
    assert manifest.text_sha256 == whole_cache.manifest.text_sha256
    assert manifest.identity(HOOKS[0]) != whole_cache.manifest.identity(HOOKS[0])
    assert live_cache.rows(TRAIN) == 512
    assert TokenStore(live_cache.path).rows(TRAIN) == 4101
    stored = list(_rows(live_cache, TRAIN))
    everything = torch.cat(list(_rows(whole_cache, TRAIN)))
    picked = torch.cat([everything[start * 128 : start * 128 + 128] for start in (0, 8, 16, 24)])
    assert torch.equal(torch.cat(stored), picked)
    assert torch.equal(torch.cat(list(_rows(live_cache, HELD_OUT))), torch.cat(list(_rows(whole_cache, HELD_OUT))))
    eligible = torch.cat([live_cache.eligible_shard(TRAIN, number) for number in range(4)])
    assert live_cache.statistics(HOOKS[0]).tokens == int(eligible.sum())
    torch.testing.assert_close(live_cache.statistics(HOOKS[0]).mean, picked[eligible].double().mean(0))
    assert len(list((live_cache.path / HOOKS[0]).iterdir())) == 6


def test_a_sample_of_everything_is_announced(
    tiny_config: TinyConfig, language_model: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"harvest__hooks": HOOKS[:1], "harvest__live": True, "data__tokens": 300}
    harvest(tiny_config(**settings, harvest__sample_tokens=128), language_model)
    assert "all activations are stored" not in capsys.readouterr().err
    cache = harvest(tiny_config(**settings, harvest__cache=str(tmp_path / "all")), language_model)
    shown = " ".join(capsys.readouterr().err.split())
    assert "a sample of 500,000 tokens, in shards of 128, covers all 300 for training, so all activations are" in shown
    assert cache.rows(TRAIN) == 300


def _rows(cache: ActivationCache, split: str) -> Iterator[Tensor]:
    for batch in cache.contexts(split, HOOKS[0]):
        assert batch.activations is not None
        yield batch.activations.flatten(0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"harvest__live": False, "harvest__sample_tokens": None}, "made with harvest.live=True, now False"),
        ({"harvest__sample_tokens": 800}, "made with harvest.sample_tokens=512, now 896"),
    ],
)
def test_another_choice_of_what_is_stored_is_refused(
    live_cache: ActivationCache, tiny_config: TinyConfig, language_model: LanguageModel, change: dict[str, object],
    message: str,
) -> None:  # fmt: skip
    settings = {"harvest__hooks": HOOKS, "harvest__live": True, "harvest__sample_tokens": 500, "data__tokens": 4101}
    with pytest.raises(CacheError, match=message):
        harvest(tiny_config(**{**settings, **change}), language_model)


def test_a_sample_without_live_is_refused(tiny_config: TinyConfig) -> None:
    with pytest.raises(ConfigError, match=r"harvest.sample_tokens has no effect without harvest.live=true"):
        tiny_config(harvest__sample_tokens=500)


@pytest.mark.parametrize("numbers", [[0, 0], [8, 0], [33]])
def test_a_manifest_that_stores_impossible_shards_contradicts_itself(
    live_cache: ActivationCache, numbers: list[int]
) -> None:
    assert live_cache.manifest.contradiction() is None
    live_cache.manifest.stored = {TRAIN: numbers, HELD_OUT: [0, 1]}
    assert live_cache.manifest.contradiction() == f"stored.train: {numbers!r}"
