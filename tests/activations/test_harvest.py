from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae.activations import ActivationCache
from sae.activations.cache import dequantise
from sae.activations.harvest import harvest
from sae.config.splits import HELD_OUT, SPLITS, TRAIN
from sae.errors import CacheError, DataError, ModelError
from sae.files.writing import write_json
from sae.model.language_model import LanguageModel
from sae.runs.verification import verify
from tests.support.harvest_case import HOOKS, Config, contents


def slow_activations(model: LanguageModel, cache: ActivationCache, hook: str, split: str) -> Iterator[Tensor]:
    """In batches unlike the harvest's, through transformer-lens's own cache."""
    for batch in cache.contexts(split, batch_contexts=16):
        _, found = model.bridge.run_with_cache(batch.tokens, names_filter=[hook])
        yield found[hook].flatten(0, 1)


@pytest.fixture(scope="module")
def truth(tiny_cache: ActivationCache, language_model: LanguageModel) -> dict[tuple[str, str], Tensor]:
    """What the model itself computes, per hook and split."""
    return {
        (hook, split): torch.cat(list(slow_activations(language_model, tiny_cache, hook, split)))
        for hook in HOOKS
        for split in SPLITS
    }


def stored(cache: ActivationCache, hook: str, split: str) -> Tensor:
    return torch.cat(
        [dequantise(*cache.activation_shard(hook, split, number)) for number in range(cache.shards(split))]
    )


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("split", SPLITS)
def test_stored_activations_are_the_models(
    tiny_cache: ActivationCache, truth: dict[tuple[str, str], Tensor], hook: str, split: str
) -> None:
    ours = stored(tiny_cache, hook, split)
    assert ours.shape == (tiny_cache.rows(split), 32)
    torch.testing.assert_close(ours, truth[hook, split], rtol=1e-5, atol=1e-5)


def test_float32_is_bit_for_bit_what_the_model_gave(
    tiny_config: Config, language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, list[Tensor]] = {hook: [] for hook in HOOKS}
    original = language_model.activations

    def watched(tokens: Tensor, hooks: Any) -> dict[str, Tensor]:
        found = original(tokens, hooks)
        if tokens.shape[1] > 2:
            for hook, x in found.items():
                given[hook].append(x.flatten(0, 1).clone())
        return found

    monkeypatch.setattr(language_model, "activations", watched)
    cache = harvest(tiny_config(harvest__hooks=HOOKS), language_model)
    for hook in HOOKS:
        ours = torch.cat([stored(cache, hook, split) for split in SPLITS])
        assert torch.equal(ours, torch.cat(given[hook]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_rounding_is_that_of_the_number_type(
    dtype: str, tiny_config: Config, tiny_cache: ActivationCache, language_model: LanguageModel
) -> None:
    """Half a unit in the last place: 2⁻¹¹ and 2⁻⁸ of the value; int8: half a 127th of the row's largest."""
    cache = harvest(tiny_config(harvest__dtype=dtype, harvest__hooks=HOOKS), language_model)
    for hook in HOOKS:
        for split in SPLITS:
            exact = stored(tiny_cache, hook, split).double()
            error = (stored(cache, hook, split).double() - exact).abs()
            bound = {
                "float16": exact.abs() * 2.0**-11 + 2.0**-25,
                "bfloat16": exact.abs() * 2.0**-8,
                "int8": exact.abs().amax(1, keepdim=True) / 127 / 2 * (1 + 1e-5),
            }[dtype].expand_as(exact)
            assert (error <= bound).all()
            assert error.max() > 0.2 * bound.max()
            if dtype != "int8":
                reference = exact.float().to(getattr(torch, dtype))
                assert torch.equal(stored(cache, hook, split), reference.float())
    assert verify(cache.path)[1] == []


def test_rows_of_zeros_survive_int8(tiny_config: Config, language_model: LanguageModel, monkeypatch) -> None:
    original = language_model.activations
    monkeypatch.setattr(
        language_model, "activations", lambda tokens, hooks: {h: 0 * x for h, x in original(tokens, hooks).items()}
    )
    cache = harvest(tiny_config(harvest__dtype="int8"), language_model)
    assert stored(cache, HOOKS[0], TRAIN).abs().max() == 0


@pytest.mark.parametrize("hook", HOOKS)
def test_statistics_are_those_of_float64(
    tiny_cache: ActivationCache, truth: dict[tuple[str, str], Tensor], language_model: LanguageModel, hook: str
) -> None:
    tokens = np.concatenate([batch.tokens.numpy().ravel() for batch in tiny_cache.contexts()])
    counts = (tokens != language_model.bos) & (np.arange(1000) % 16 != 0)
    x = truth[hook, TRAIN].numpy().astype(np.float64)[counts]
    ours = tiny_cache.statistics(hook)
    assert ours.tokens == counts.sum() == len(x)
    np.testing.assert_allclose(ours.mean.numpy(), x.mean(0), rtol=1e-5, atol=1e-6)
    assert ours.mean_squared_norm == pytest.approx((x**2).sum(1).mean(), rel=1e-6)


@pytest.mark.parametrize(("tokens", "held_out"), [(1, 1), (16, 17), (127, 33), (128, 129), (257, 128)])
def test_exactly_the_tokens_asked_for(
    tiny_config: Config, language_model: LanguageModel, tokens: int, held_out: int
) -> None:
    cache = harvest(tiny_config(data__tokens=tokens, data__held_out_tokens=held_out), language_model)
    for split, rows in ((TRAIN, tokens), (HELD_OUT, held_out)):
        assert cache.rows(split) == rows
        assert len(stored(cache, HOOKS[0], split)) == rows
        assert sum(batch.tokens.numel() for batch in cache.contexts(split)) == rows
        assert sum(len(cache.token_shard(split, number)[0]) for number in range(cache.shards(split))) == rows


def test_one_pass_for_two_hooks_equals_one_pass_each(
    tiny_config: Config, tiny_cache: ActivationCache, language_model: LanguageModel
) -> None:
    for hook in HOOKS:
        cache = harvest(tiny_config(harvest__hooks=[hook]), language_model)
        for split in SPLITS:
            torch.testing.assert_close(
                stored(cache, hook, split), stored(tiny_cache, hook, split), rtol=1e-6, atol=1e-6
            )
        shutil.rmtree(cache.path)


def test_activations_do_not_depend_on_the_caller_s_autocast(
    tiny_config: Config, language_model: LanguageModel, tiny_cache: ActivationCache
) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        cache = harvest(tiny_config(), language_model)
    [hook] = cache.hooks
    assert torch.equal(stored(cache, hook, "train"), stored(tiny_cache, hook, "train"))


def test_progress_counts_every_token_once(tiny_config: Config, language_model: LanguageModel) -> None:
    seen: list[tuple[int, int]] = []
    harvest(tiny_config(), language_model, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (1200, 1200)
    assert seen == sorted(set(seen))
    seen.clear()
    harvest(tiny_config(), language_model, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (1200, 1200)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            {"data__tokens": 999},
            r"made with data.tokens=1000, now 999 is asked for; set harvest.cache to another folder",
        ),
        ({"data__context_length": 32}, r"made with data.context_length=16, now 32"),
        ({"data__source": "stdlib"}, r"made with data.source='.*corpus', now 'stdlib'"),
        ({"data__section_characters": 100}, r"made with data.section_characters=None, now 100"),
        ({"data__prepend_bos": False}, r"made with data.prepend_bos=True, now False"),
        ({"harvest__hooks": HOOKS}, r"made with harvest.hooks=\['blocks.1.hook_resid_pre'\], now \["),
        ({"harvest__dtype": "int8"}, r"made with harvest.dtype='float32', now 'int8'"),
        ({"harvest__masked_positions": 0}, r"made with harvest.masked_positions=1, now 0"),
        ({"harvest__mask_special_tokens": False}, r"made with harvest.mask_special_tokens=True, now False"),
        ({"model__weight_processing": "fold_ln"}, r"made with model.weight_processing='none', now 'fold_ln'"),
        ({"model__name": "gpt2"}, r"made with model.name='tiny', now 'gpt2'"),
    ],
)
def test_a_cache_of_other_settings_is_refused(
    override: dict[str, Any], message: str, tiny_config: Config, tiny_cache: ActivationCache,
    language_model: LanguageModel, tmp_path: Path,
) -> None:  # fmt: skip
    folder = tmp_path / "cache"
    shutil.copytree(tiny_cache.path, folder)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["hooks"][HOOKS[1]]
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if not name.startswith(HOOKS[1])}
    write_json(folder / "manifest.json", manifest)
    before = contents(folder)
    harvest(tiny_config(harvest__cache=str(folder)), language_model)
    assert contents(folder) == before
    with pytest.raises(CacheError, match=message):
        harvest(tiny_config(harvest__cache=str(folder), **override), language_model)
    assert contents(folder) == before


def test_names_that_are_no_text_are_written(
    tiny_config: Config, text_folder: Path, language_model: LanguageModel, tmp_path: Path
) -> None:
    source = shutil.copytree(text_folder, tmp_path / "text")
    for number, file in enumerate(sorted(source.rglob("*.txt"))):
        file.rename(os.fsdecode(bytes(file.parent) + b"/%d-caf\xe9.txt" % number))
    names = harvest(tiny_config(data__source=str(source)), language_model).documents("train")
    assert names
    assert all(name.endswith("-caf\\xe9.txt") for name in names)


def test_model_named_from_the_home_folder_goes_on(
    tiny_config: Config, tiny_model: Path, language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tiny_model.parent))
    for _ in range(2):
        harvest(tiny_config(model__name=f"~/{tiny_model.name}"), language_model)


def test_tokenizer_without_special_tokens_goes_on(
    tiny_config: Config, language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plain:
        bos_token_id, eos_token_id, all_special_ids = None, None, ()

        def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[len(word) for word in text.split()] for text in texts]}

    monkeypatch.setattr(language_model, "tokenizer", Plain())
    for _ in range(2):
        cache = harvest(tiny_config(data__prepend_bos=False), language_model)
    assert cache.policy.masked_ids == ()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_nan_weights_are_an_error(dtype: str, tiny_config: Config, language_model: LanguageModel) -> None:
    weight = language_model.bridge.original_model.transformer.h[0].mlp
    bias = next(parameter for name, parameter in weight.named_parameters() if name.endswith("bias"))
    kept = bias.detach().clone()
    try:
        bias.data[0] = float("nan")
        with pytest.raises(
            CacheError, match=rf"hook '{HOOKS[0]}': the model gives values that are not finite \(NaN or"
        ):
            harvest(tiny_config(harvest__dtype=dtype), language_model)
    finally:
        bias.data.copy_(kept)


def test_float16_overflow_names_the_way_out(tiny_config: Config, language_model: LanguageModel) -> None:
    parameters = language_model.bridge.original_model.transformer.h[0].mlp.named_parameters()
    biases = [parameter for name, parameter in parameters if name.endswith("bias") and parameter.shape == (32,)]
    kept = biases[0].detach().clone()
    try:
        biases[0].data[3] = 70_000
        with pytest.raises(CacheError, match=r"exceed what float16 can hold \(65,504\); set harvest.dtype=bfloat16"):
            harvest(tiny_config(harvest__dtype="float16"), language_model)
        shutil.rmtree(tiny_config().cache_folder)
        cache = harvest(tiny_config(harvest__dtype="bfloat16"), language_model)
        assert stored(cache, HOOKS[0], TRAIN)[:, 3].min() > 65_504
    finally:
        biases[0].data.copy_(kept)


def test_unwritable_folder(tiny_config: Config, language_model: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    for folder in (tmp_path / "file" / "cache", Path("/proc/cache")):
        with pytest.raises(CacheError, match=rf"cannot write '{folder}': .*; choose another folder or change"):
            harvest(tiny_config(harvest__cache=str(folder)), language_model)


def test_two_harvests_in_one_folder(tiny_config: Config, language_model: LanguageModel) -> None:
    def second(done: int, total: int) -> None:
        with (
            ThreadPoolExecutor(1) as pool,
            pytest.raises(CacheError, match=r"another harvest is writing it; wait for it or stop it"),
        ):
            pool.submit(harvest, tiny_config(), language_model).result()

    harvest(tiny_config(), language_model, second)


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ({"harvest__hooks": ["blocks.9.hook_resid_pre"]}, ModelError, r"tiny has blocks 0 to 2"),
        ({"data__context_length": 65}, ModelError, r"reads at most 64 tokens"),
        ({"data__tokens": 10**7}, DataError, r"the train documents hold [\d,]+ tokens, data.tokens=10,000,000"),
    ],
)
def test_impossible_requests(
    override: dict[str, Any], error: type[Exception], message: str, tiny_config: Config, language_model: LanguageModel
) -> None:
    with pytest.raises(error, match=message):
        harvest(tiny_config(**override), language_model)
    harvest(tiny_config(), language_model)  # what the refused request left behind is in nobody's way
