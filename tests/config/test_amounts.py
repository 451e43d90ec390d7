"""Settings that cannot work are refused before anything runs; single values stand for lists of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sae.config.check import amount_notes, check_amounts
from sae.config.file import load_config
from sae.config.settings import DictionaryConfig, RunConfig, TrainConfig
from sae.config.sources import HarvestConfig
from sae.errors import CacheError, ConfigError
from sae.model.language_model import LanguageModel
from sae.probing.settings import ProbeConfig
from sae.runs import pipeline
from sae.runs.run import Run


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"data__tokens": 50, "train__batch_size": 64},
            "data.tokens=50, less 4 that are masked, are fewer than one batch of train.batch",
        ),
        ({"data__tokens": 64, "train__batch_size": 64}, "data.tokens=64, less 4 that are masked, are fewer than one"),
        ({"train__tokens": 63}, "train.tokens=63 are fewer than one batch"),
        ({"evaluation__tokens": 15}, "evaluation.tokens=15: less than one context of 16 tokens"),
        ({"evaluation__downstream_tokens": 3}, "evaluation.downstream_tokens=3: less than one context of 16"),
        ({"features__tokens": 5}, "features.tokens=5: less than one context of 16"),
        (
            {"harvest__masked_positions": 16},
            "data.context_length=16: the first 16 positions of every context are masked, and a loss needs two more "
            r"\(a token and the next one\); raise it to 18 at least, or lower harvest.masked_positions",
        ),
        ({"harvest__masked_positions": 15}, "data.context_length=16: the first 15 positions of every context are mask"),
        ({"data__context_length": 2}, "data.context_length=2: the first 1 positions .* raise it to 3 at least"),
        ({"data__held_out_tokens": 2}, "data.held_out_tokens=2: the first 1 positions of every context are masked"),
        ({"train__snapshots": 2000}, "train.snapshots has 2,000, and training ends after 937 tokens"),
    ],
)
def test_amounts_that_cannot_work(settings: dict[str, Any], message: str, tiny_config: Any) -> None:
    run = Run(tiny_config(**settings))
    with pytest.raises(ConfigError, match=message):
        run.check()
    assert not run.folder.exists()


def test_what_is_worth_knowing_is_said_once(tiny_config: Any) -> None:
    config = tiny_config(data__tokens=50, train__tokens=40_000, evaluation__tokens=5000)
    check_amounts(config)
    assert amount_notes(config) == [
        "train.tokens=40,000 is 800 epochs of data.tokens=50; train.tokens=null is one epoch",
        "evaluation.tokens=5,000 is more than the 200 cached tokens: all of them are read",
    ]
    assert amount_notes(tiny_config()) == []


def test_a_single_value_is_a_list_of_one() -> None:
    assert HarvestConfig(hooks="blocks.0.hook_resid_pre").hooks == ("blocks.0.hook_resid_pre",)  # type: ignore[arg-type]
    assert TrainConfig(freeze="W_dec", snapshots=5).freeze == ("W_dec",)  # type: ignore[arg-type]
    assert DictionaryConfig(prefixes=1.0).prefixes == (1.0,)  # type: ignore[arg-type]
    assert ProbeConfig(k=3).k == (3,)  # type: ignore[arg-type]
    config = load_config(None, ["data.chat_roles=assistant", "train.snapshots=1e3", "dictionary.prefixes=1"])
    assert (config.data.chat_roles, config.train.snapshots) == (("assistant",), (1000,))
    assert RunConfig(data={"source": "books"}).data.sources == ("books",)  # type: ignore[arg-type]


def test_one_hook_point_by_its_name(language_model: LanguageModel) -> None:
    import torch

    tokens = torch.tensor([[0, 5, 6]])
    assert list(language_model.activations(tokens, "blocks.1.hook_mlp_out")) == ["blocks.1.hook_mlp_out"]


def test_a_source_is_known_by_what_it_holds(
    tiny_config: Any, tmp_path: Path, language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(30):
        (texts / f"{number}.txt").write_text(f"{number} the river keeps a stone house " * 20)
    monkeypatch.chdir(tmp_path)
    config = tiny_config(data__source="texts", data__tokens=400, data__held_out_tokens=64)
    cache = pipeline.harvest(config)
    assert cache.manifest.data["source"] == "texts"
    before = cache.manifest.identity(cache.hooks[0])

    def asked(source: Path) -> Run:
        return Run(config.model_copy(update={"data": config.data.model_copy(update={"source": str(source)})}))

    assert asked(texts).harvest().manifest.identity(cache.hooks[0]) == before
    texts.rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    for place in ("moved", "link"):
        asked(tmp_path / place).harvest()
    asked(tmp_path / "texts").cache()  # the text is gone, and the cache is not
    (tmp_path / "moved").rename(texts)
    (texts / "3.txt").write_text("4 the river keeps a stone house " * 20)
    with pytest.raises(CacheError, match=r"the text of data.source='texts' has changed since it was made; set"):
        Run(config).harvest()
    Run(config).cache()
