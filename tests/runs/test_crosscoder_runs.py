"""Runs that train a crosscoder of several hook points, from a cache and live; resumed, reopened, refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sae
from sae.activations.loader import ActivationLoader
from sae.config.file import load_config
from sae.config.patterns import with_hook_points
from sae.config.settings import RunConfig
from sae.dictionary.frame import Frame
from sae.dictionary.sites import Site, Sites
from sae.errors import ConfigError, FormatError
from sae.runs.folder import check_run
from sae.runs.pipeline import run
from sae.runs.run import Run
from sae.runs.sweeping import sweep
from sae.training import JoinedSource
from sae.training.loop import train

FIRST, SECOND = "blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out"
NAMES = [f"blocks.{block}.{kind}" for block in range(3) for kind in ("hook_resid_pre", "hook_mlp_out")]
TinyConfig = Callable[..., RunConfig]


def settings(**more: Any) -> dict[str, Any]:
    return {
        "harvest__hooks": [FIRST, SECOND], "dictionary__reads": [FIRST, SECOND], "data__tokens": 2000,
        "train__tokens": 1920, **more,
    }  # fmt: skip


@pytest.mark.parametrize("live", [False, True])
def test_a_run_trains_a_crosscoder(tiny_config: TinyConfig, live: bool) -> None:
    """Weights are those that training on the joined sources gives; the two sites have different scales."""
    config = tiny_config(**settings(harvest__live=live))
    finished = run(config)
    dictionary = finished.dictionary()
    assert (dictionary.d_in, dictionary.d_out, dictionary.frame) == (64, 64, Frame(site_widths=(32, 32)))
    sites = Sites((Site(FIRST, 32), Site(SECOND, 32)))
    assert dictionary.origin.reads == dictionary.origin.gives == sites
    assert [site.width for site in dictionary.origin.reads] == [32, 32]
    assert not dictionary.is_transcoder
    first, second = dictionary.metadata["trained"]["normalisation_scale"]
    assert first != second
    cache = finished.cache()
    for hook, scale in ((FIRST, first), (SECOND, second)):
        assert cache.statistics(hook).variance * scale**2 == pytest.approx(32, rel=1e-6)
    source = JoinedSource(list(Run(config).sources(cache, (FIRST, SECOND)).values()))
    alone = train(source, config.dictionary, config.train, seed=config.seed)
    assert torch.equal(alone.W_dec, dictionary.W_dec) and torch.equal(alone.W_enc, dictionary.W_enc)
    assert alone.metadata["activations"] == dictionary.metadata["activations"]
    assert torch.equal(run(config).dictionary().W_dec, dictionary.W_dec)  # nothing is trained again
    check_run(finished.folder)


@pytest.mark.parametrize("live", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(tiny_config: TinyConfig, live: bool) -> None:
    config = tiny_config(**settings(harvest__live=live, train__checkpoint_every=5, train__keep_checkpoints=9))
    whole = Run(config)
    whole.harvest()
    expected = whole.train()
    checkpoints = sorted((whole.folder / "checkpoints").iterdir())
    shutil.rmtree(checkpoints[-1])
    shutil.rmtree(whole.folder / "dictionary")
    assert len(checkpoints) > 2
    resumed = Run(config).train()
    for (name, ours), theirs in zip(resumed.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_order_of_the_sites_is_a_setting(tiny_config: TinyConfig) -> None:
    first = Run(tiny_config(**settings()))
    first.harvest()
    first.train()
    swapped = first.config.model_copy(
        update={"dictionary": first.config.dictionary.model_copy(update={"reads": (SECOND, FIRST)})}
    )
    with pytest.raises(FormatError, match=rf"made with reads=\['{FIRST}', '{SECOND}'\], now \['{SECOND}', '{FIRST}'\]"):
        Run(swapped).train()
    alone = first.config.model_copy(
        update={"dictionary": first.config.dictionary.model_copy(update={"reads": FIRST})}
    )  # fmt: skip
    with pytest.raises(FormatError, match=rf"made with reads=\['{FIRST}', '{SECOND}'\], now '{FIRST}' is asked for"):
        Run(alone).train()


def test_the_command_line_trains_one(tiny_config: TinyConfig, command: Any) -> None:
    config = tiny_config(**settings())
    finished = run(config)
    done = command("run", finished.folder / "config.yaml")
    assert done.status == 0 and "site_widths=[32, 32]" in done.out
    shown = command("info", finished.folder)
    assert shown.status == 0 and FIRST in shown.out and SECOND in shown.out


def test_steps_that_take_a_single_hook_point_say_so(tiny_config: TinyConfig) -> None:
    finished = run(tiny_config(**settings()))
    for step in (finished.evaluate, finished.features):
        with pytest.raises(ConfigError, match=r"reads names 2 hook points, .* only dictionaries of a single one"):
            step()
    config = tiny_config(**settings(sweep={"dictionary": {"k": [2, 4]}}))
    with pytest.raises(ConfigError, match="not possible yet for a crosscoder: use 'sae run'"):
        sweep(config)


def test_a_pattern_names_the_sites_of_one_crosscoder() -> None:
    words = ["harvest.hooks=blocks.*.hook_mlp_out", "dictionary.reads=blocks.*.hook_mlp_out"]
    config = with_hook_points(load_config(None, words), lambda: NAMES)
    assert config.reads == config.hooks == tuple(NAMES[1::2])
    assert config.is_crosscoder


REFUSED = {
    "another output": (["dictionary.gives=blocks.2.hook_mlp_out"], "a crosscoder gives the hook points that it reads"),
    "a hook point twice": ([f"dictionary.reads=[{FIRST}, {FIRST}]"], "reads names a hook point more than once"),
    "one that is not harvested": ([f"dictionary.reads=[{FIRST}, {NAMES[0]}]"], f"'{NAMES[0]}' is not harvested"),
    "several outputs": (
        [f"dictionary.reads={FIRST}", f"dictionary.gives=[{FIRST}, {SECOND}]"], r"cross-layer transcoder\) cannot"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_sites_that_cannot_be_trained_on_are_refused(case: str) -> None:
    words, message = REFUSED[case]
    base = [f"harvest.hooks=[{FIRST}, {SECOND}]", f"dictionary.reads=[{FIRST}, {SECOND}]"]
    with pytest.raises(ConfigError, match=message):
        load_config(None, [*base, *words])


def test_caches_of_other_text_or_order_are_not_joined(tiny_config: TinyConfig, tmp_path: Path) -> None:
    one = Run(tiny_config(**settings())).harvest()
    other = Run(tiny_config(**settings(data__tokens=1900, harvest__cache=str(tmp_path / "other")))).harvest()

    def loader(cache: sae.ActivationCache, hook: str, seed: int = 0) -> ActivationLoader:
        return ActivationLoader(cache, hook, batch_size=64, seed=seed)

    with pytest.raises(ConfigError, match="have other text, so a crosscoder cannot read them together: harvest all"):
        JoinedSource([loader(one, FIRST), loader(other, SECOND)])
    with pytest.raises(ConfigError, match="give tokens in different orders: load them with the same split, seed"):
        JoinedSource([loader(one, FIRST), loader(one, SECOND, seed=1)])
