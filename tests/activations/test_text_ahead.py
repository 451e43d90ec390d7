"""The text is written while the model runs over it: the same cache, whatever happens on the way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sae.activations import harvest as harvesting
from sae.activations import token_shards
from sae.activations.harvest import harvest
from sae.activations.text_ahead import TextAhead
from sae.errors import DataError
from sae.model.language_model import LanguageModel
from tests.support.harvest_case import Config, contents

PATIENCE = 60


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harvesting, "_at_once", lambda model: True)


@pytest.fixture(params=[{}, {"harvest__live": True, "harvest__sample_tokens": 256}], ids=["whole", "live"])
def config(request: pytest.FixtureRequest, tiny_config: Config, tmp_path: Path) -> Any:
    return lambda name, **options: tiny_config(harvest__cache=str(tmp_path / name), **{**request.param, **options})


def texts(monkeypatch: pytest.MonkeyPatch, before_shard: Any) -> None:
    """Have `before_shard(number)` called before each shard of tokens is given."""
    original = token_shards.packed_shards

    def packed_shards(*arguments: Any) -> Iterator[Any]:
        for number, shard in enumerate(original(*arguments)):
            before_shard(number)
            yield shard

    monkeypatch.setattr(token_shards, "packed_shards", packed_shards)


def watch(monkeypatch: pytest.MonkeyPatch, model: LanguageModel, begun: Any) -> None:
    """Have `begun()` called before each pass of the model over contexts."""
    original = model.activations

    def activations(tokens: Any, hooks: Any) -> Any:
        if tokens.shape[1] > 2:
            begun()
        return original(tokens, hooks)

    monkeypatch.setattr(model, "activations", activations)


def test_the_model_runs_while_the_text_is_written(
    config: Any, language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last shard of tokens is written only after the model has begun; the cache is that of one after the other."""
    one_after_the_other = harvest(config("a"), language_model)
    monkeypatch.setattr(harvesting, "_at_once", lambda model: True)
    running, waited = threading.Event(), []
    watch(monkeypatch, language_model, running.set)
    texts(monkeypatch, lambda number: waited.append(running.wait(PATIENCE)) if number == 3 else None)
    at_once = harvest(config("b"), language_model)
    assert waited == [True]
    assert contents(at_once.path) == contents(one_after_the_other.path)


@pytest.mark.usefixtures("at_once")
def test_a_text_that_is_too_short_ends_the_harvest(
    config: Any, language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the model has got as far as the text; nothing that is left behind is taken for a cache."""
    with pytest.raises(DataError, match=r"data.tokens"):
        harvest(config("a", data__tokens=10**7), language_model)
    assert not (config("a").cache_folder / "manifest.json").exists()
    right = contents(harvest(config("b"), language_model).path)
    found = contents(harvest(config("a"), language_model).path)
    assert right.items() <= found.items()


@pytest.mark.usefixtures("at_once")
def test_an_interrupt_ends_the_writing_of_the_text(
    config: Any, language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C during the first pass: the text is not written to its end, and the next harvest is whole."""
    interrupted = threading.Event()

    def begun() -> None:
        interrupted.set()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        watch(patch, language_model, begun)
        texts(patch, lambda number: interrupted.wait(PATIENCE) if number == 3 else None)
        before = threading.active_count()
        with pytest.raises(KeyboardInterrupt):
            harvest(config("a"), language_model)
        assert threading.active_count() <= before
    assert not (config("a").cache_folder / "manifest.json").exists()
    right = contents(harvest(config("b"), language_model).path)
    assert right.items() <= contents(harvest(config("a"), language_model).path).items()


def test_a_file_that_never_comes_is_not_waited_for() -> None:
    text = TextAhead(lambda finished: [finished("a")] and ["remark"])
    text.wait_for("a")
    assert text.wait() == ["remark"]
    with pytest.raises(FileNotFoundError):
        text.wait_for("b")
    text.close()


def test_what_ends_the_writing_reaches_those_who_wait() -> None:
    def write(finished: Any) -> list[str]:
        finished("a")
        raise DataError("no more text")

    text = TextAhead(write)
    text.wait_for("a")
    for wait in (text.wait, lambda: text.wait_for("b")):
        with pytest.raises(DataError, match="no more text"):
            wait()
    assert not text.is_whole()
    text.close()
