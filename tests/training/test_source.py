"""A source of any iterable: what it takes, what it leaves out, what it refuses."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import sae
from sae.activations.loader import ActivationLoader
from sae.errors import ConfigError, SaeError, TrainingError
from sae.training import BatchSource, IterableSource


class Batches:
    """Starts anew each time, and is no list, whose items the tests' type checker would look at."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def numbered(*sizes: int) -> list[Tensor]:
    """Batches of those sizes; the first column counts the rows."""
    rows = torch.stack([torch.arange(sum(sizes)).float(), torch.ones(sum(sizes))], dim=1)
    return list(rows.split(sizes))


def first_rows(source: IterableSource, batches: int) -> list[float]:
    return [float(batch[0, 0]) for batch in itertools.islice(source, batches)]


def test_statistics_come_from_the_first_batches() -> None:
    source = IterableSource(numbered(2, 2, 2), estimate_from=2)
    assert (source.batch_size, source.d_in, source.statistics.tokens) == (2, 2, 4)
    assert source.statistics.mean.tolist() == [1.5, 1.0]
    assert source.statistics.mean_squared_norm == (1 + 2 + 5 + 10) / 4


def test_shorter_last_batches_are_left_out_in_every_epoch() -> None:
    source = IterableSource(torch.utils.data.DataLoader(numbered(10)[0], batch_size=4))  # type: ignore[arg-type]
    assert source.batch_size == 4
    assert first_rows(source, 5) == [0, 4, 0, 4, 0]


def test_a_place_counts_the_batches_that_were_given() -> None:
    source = IterableSource(numbered(4, 4, 2))
    assert first_rows(source, 3) == [0, 4, 0]
    again = IterableSource(numbered(4, 4, 2))
    again.load_state_dict(source.state_dict())
    assert first_rows(again, 3) == [4, 0, 4]


def refusal(kind: type[SaeError], batches: Any, take: int = 0) -> str:
    with pytest.raises(kind) as caught:
        list(itertools.islice(IterableSource(batches), take))
    return str(caught.value)


def test_iterators_are_refused_before_they_lose_a_batch() -> None:
    batches = (batch for batch in numbered(2, 2))
    message = refusal(ConfigError, batches)
    assert message.startswith("batches is a generator, which can be read only once;")
    assert message.endswith("pass a list, or an object whose __iter__ starts again")
    assert len(list(batches)) == 2


def test_batches_of_the_wrong_kind_are_refused() -> None:
    assert "the batches are empty: expected at least one of shape [batch, d_in]" in refusal(TrainingError, Batches())
    assert "the batches are empty" in refusal(TrainingError, Batches(torch.zeros(0, 3)))
    assert "a batch has shape [2, 3, 4]: expected [batch, d_in]" in refusal(TrainingError, Batches(torch.ones(2, 3, 4)))
    assert "a batch has shape [3]: expected [batch, d_in]" in refusal(TrainingError, Batches(torch.ones(3)))
    assert "a batch has shape []: expected [batch, d_in]" in refusal(TrainingError, Batches(torch.tensor(1.0)))
    two_widths = Batches(torch.ones(2, 3), torch.ones(2, 4))
    assert "a batch has shape [2, 4]: expected [batch, d_in], with d_in the same" in refusal(TrainingError, two_widths)
    assert "a batch is a list: expected a tensor [batch, d_in]" in refusal(TrainingError, Batches([torch.ones(2, 3)]))
    longer = Batches(torch.ones(2, 3), torch.ones(5, 3))
    assert refusal(TrainingError, longer, take=2) == (
        "a batch has 5 rows, the first had 2: make all batches equally long"
    )


SHAPE = sae.DictionaryConfig(d_sae=32, k=2)
BATCHES = list(torch.randn(30, 16, 8, generator=torch.manual_seed(0)))


def trained(source: BatchSource, target: BatchSource | None = None) -> sae.Dictionary:
    settings = sae.TrainConfig(tokens=16 * 20, batch_size=16, dead_after_tokens=160)
    return sae.train(source, SHAPE, settings, target=target)


def test_every_training_reads_from_the_beginning() -> None:
    source = IterableSource(BATCHES)
    first, second = trained(source), trained(source)
    assert torch.equal(first.W_dec, second.W_dec)


def test_loaders_are_read_from_the_beginning_and_in_one_order(tiny_cache: sae.ActivationCache) -> None:
    def loader(seed: int) -> ActivationLoader:
        return ActivationLoader(tiny_cache, "blocks.1.hook_resid_pre", batch_size=16, seed=seed)

    used = loader(0)
    next(iter(used))
    assert torch.equal(trained(used).W_dec, trained(loader(0)).W_dec)
    with pytest.raises(ConfigError, match="input and target give tokens in different orders: load them with the same"):
        trained(loader(0), target=loader(1))
    assert trained(loader(0), target=loader(0)).d_in == tiny_cache.d_in("blocks.1.hook_resid_pre")


def test_a_source_is_not_made_one_of_again(tiny_cache: sae.ActivationCache) -> None:
    """It would forget its hook point, its model and its place."""
    loader = ActivationLoader(tiny_cache, "blocks.1.hook_resid_pre", batch_size=16)
    for source in (loader, IterableSource(BATCHES)):
        with pytest.raises(ConfigError, match=f"batches is a {type(source).__name__}, a source already"):
            IterableSource(source)


def test_batches_of_any_floating_type_are_taken() -> None:
    single, double = trained(IterableSource(BATCHES)), trained(IterableSource([batch.double() for batch in BATCHES]))
    assert torch.equal(single.W_dec, double.W_dec)


def test_targets_of_other_tokens_are_refused() -> None:
    source = IterableSource(BATCHES)
    with pytest.raises(ConfigError, match=r"input and target are the same source, .*: leave target out"):
        trained(source, target=source)
    recipes = {name: sae.Recipe(SHAPE, sae.TrainConfig(tokens=320), source=name) for name in "ab"}
    with pytest.raises(
        ConfigError, match=r"a and b are the same source, .*: name it once, for all recipes that read it"
    ):
        sae.train_all({"a": source, "b": source}, recipes)
    for ours, theirs in ((BATCHES, BATCHES[:10]), (BATCHES[:10], BATCHES)):
        with pytest.raises(TrainingError, match="at step 11 input and target differ in length"):
            trained(IterableSource(ours), target=IterableSource(theirs))
    assert trained(IterableSource(BATCHES[:10]), target=IterableSource(BATCHES[:10])).d_sae == 32


WRONG = """
import sae, torch
batches = torch.randn(5, 16, 8)
for source, how in ((iter(list(batches)), {}), (batches, {}), (sae.IterableSource(list(batches)), {"start": "folder"})):
    try:
        sae.train(source, sae.DictionaryConfig(d_sae=32, k=2), sae.TrainConfig(tokens=320), **how)
    except sae.SaeError as error:
        print(error)
"""


def test_what_is_no_source_or_start_is_refused_with_the_way_out() -> None:
    """In a process of its own, where types are not checked before."""
    said = subprocess.run([sys.executable, "-c", WRONG], capture_output=True, text=True, check=True).stdout.splitlines()
    way_out = "is not a source of batches: give an ActivationLoader, or sae.IterableSource(batches) with a list of tens"
    assert said[0].startswith(f"input: a list_iterator {way_out}")
    assert said[1].startswith(f"input: a Tensor {way_out}")
    assert said[2] == "start is a str: give a dictionary, such as sae.load(folder)"
    assert len(said) == 3
