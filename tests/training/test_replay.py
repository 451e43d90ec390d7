"""Replayed steps are the plain ones: whole trainings with CUDA graphs that a recorder simulates."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sae.config.settings import DictionaryConfig, TrainConfig
from sae.dictionary.base import Dictionary
from sae.errors import TrainingError
from sae.kernels import sparse
from sae.training import IterableSource, firing, member, replay, train
from sae.training import optimizer as optimizer_module
from sae.training import trainer as trainer_module
from sae.training.loop import train_all
from sae.training.recipe import Recipe
from tests.support import fixed_kernels, recording
from tests.support.recording import SimulatedGraph

ARCHITECTURES = ["topk", "batch_topk", "matryoshka", "relu", "gated", "jumprelu"]
WITH_ROOM = ["relu", "gated", "jumprelu"]
BATCH, D_IN, D_SAE, K = 16, 6, 48, 2


class Simulated(replay.Recorder):
    """Records without a GPU."""

    graphs: list[SimulatedGraph]

    def begin(self) -> SimulatedGraph:
        self.graphs.append(SimulatedGraph())
        return self.graphs[-1]

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        yield

    def settle(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refreshed often, so that dead features and the density change a few times, and with them what is recorded."""
    for module in (sparse, optimizer_module):
        monkeypatch.setattr(module, "kernels_for", lambda weights: fixed_kernels)
    monkeypatch.setattr(trainer_module, "is_replayable", lambda device, d_in: True)
    monkeypatch.setattr(firing, "_SMALLEST_LIST", 4)
    monkeypatch.setattr(member, "Recorder", Simulated)
    Simulated.graphs = []
    take = replay.Replay.step

    def forgotten(self: replay.Replay, raw: Tensor, raw_target: Tensor | None) -> tuple[str, ...]:
        names = take(self, raw, raw_target)
        for graph in Simulated.graphs:
            graph.recording.forget()
        return names

    monkeypatch.setattr(replay.Replay, "step", forgotten)
    plain = firing.FiringRecord.__init__
    monkeypatch.setattr(
        firing.FiringRecord, "__init__", lambda self, *args, **kwargs: plain(self, *args, refresh_every=5, **kwargs)
    )


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(30, D_IN, generator=generator), dim=1)
    codes = (torch.rand(count, BATCH, 30, generator=generator) < 0.1) * torch.rand(
        count, BATCH, 30, generator=generator
    )
    return list(codes @ directions)


def settings(steps: int, **chosen) -> TrainConfig:
    return TrainConfig(
        tokens=steps * BATCH, batch_size=BATCH,
        **{"lr": 3e-3, "log_every": 4, "warmup_fraction": 0.5, "dead_after_tokens": 3 * BATCH, **chosen},
    )  # fmt: skip


def shape(architecture: str) -> DictionaryConfig:
    return DictionaryConfig(architecture=architecture, d_sae=D_SAE, k=K)  # type: ignore[arg-type]


def trained(architecture: str, data: list[Tensor], chosen: TrainConfig, folder: Path) -> tuple[Dictionary, list[dict]]:
    dictionary = train(IterableSource(data), shape(architecture), chosen, folder=folder)
    return dictionary, lines_of(folder)


def lines_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def plainly(chosen: TrainConfig) -> TrainConfig:
    return chosen.model_copy(update={"cuda_graph": False})


def replays() -> int:
    return sum(graph.replays for graph in Simulated.graphs)


def check_equal(ours: Dictionary, theirs: Dictionary) -> None:
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(parameter, other), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_replayed_steps_are_the_plain_ones_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    """With rates, targets and penalties that change in every step, dead features, clipping and several epochs."""
    data, chosen = batches(7), settings(60, max_gradient_norm=2.0)
    plain, lines = trained(architecture, data, plainly(chosen), tmp_path / "plain")
    assert not Simulated.graphs
    replayed, other_lines = trained(architecture, data, chosen, tmp_path / "replayed")
    assert replays() >= 30
    assert len(Simulated.graphs) < 30
    check_equal(replayed, plain)
    for line, other in zip(lines, other_lines, strict=True):
        assert line.keys() == other.keys()
        assert other == pytest.approx(line, rel=1e-5 if architecture in WITH_ROOM else 0, abs=0), line["step"]
    if architecture != "relu":
        assert any(line.get("aux") for line in lines), "no feature is dead, so AuxK is not tested"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outliers_are_left_out_of_replayed_steps(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each counted once, also in a step that is taken again because there was no room for its pairs."""
    data, chosen = batches(7), settings(84, sparsity_warmup_fraction=0.0 if architecture in WITH_ROOM else None)
    for number, row in ((2, 3), (5, 0)):
        data[number][row] = 1e3 * data[number].norm(dim=1).max()
    plain, _ = trained(architecture, data, plainly(chosen), tmp_path / "plain")
    monkeypatch.setattr(replay, "SLACK", 1.0)
    monkeypatch.setattr(replay, "rounded_up", lambda number: -(-max(number, 1) // 4) * 4)
    replayed, lines = trained(architecture, data, chosen, tmp_path / "replayed")
    assert replays() >= 10
    check_equal(replayed, plain)
    assert lines[-1]["left_out"] == replayed.metadata["trained"]["left_out"] == 24


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_replayed_steps_of_a_transcoder_are_the_plain_ones(architecture: str, skip: bool, tmp_path: Path) -> None:
    """To a target of another width, with and without a skip connection; two of them in a pass, next to an SAE."""
    data, chosen = batches(7), settings(60, max_gradient_norm=2.0)
    targets = [torch.cat([x.flip(1), x.relu()], dim=1)[:, :9] for x in data]
    config = shape(architecture).model_copy(update={"skip": skip})

    def pass_of(chosen: TrainConfig, name: str) -> dict[str, Dictionary]:
        recipes = {
            "one": Recipe(config, chosen, 0, "x", "y", folder=tmp_path / name / "one"),
            "two": Recipe(config, chosen, 1, "x", "y", folder=tmp_path / name / "two"),
            "sae": Recipe(shape(architecture), chosen, 0, "y", folder=tmp_path / name / "sae"),
        }
        return train_all({"x": IterableSource(data), "y": IterableSource(targets)}, recipes).dictionaries

    plain = pass_of(plainly(chosen), "plain")
    assert not Simulated.graphs
    replayed = pass_of(chosen, "replayed")
    assert replays() >= 90
    for name, made in plain.items():
        check_equal(replayed[name], made)
        for line, other in zip(
            lines_of(tmp_path / "plain" / name), lines_of(tmp_path / "replayed" / name), strict=True
        ):
            assert other == pytest.approx(line, rel=1e-5 if architecture in WITH_ROOM else 0, abs=0), line["step"]
    assert (plain["one"].d_in, plain["one"].d_out) == (D_IN, 9)
    assert (plain["one"].W_skip is not None) == skip


@pytest.mark.parametrize("architecture", WITH_ROOM)
def test_a_step_with_more_pairs_than_there_is_room_for_is_taken_plainly(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for as many pairs as in the step before, so that every increase is too much."""
    rising = {"l1_coefficient": 1e-3, "dead_after_tokens": None} if architecture == "relu" else {}
    data, chosen = batches(7), settings(40, sparsity_warmup_fraction=0.0, **rising)
    plain, _ = trained(architecture, data, plainly(chosen), tmp_path / "plain")
    monkeypatch.setattr(replay, "SLACK", 1.0)
    monkeypatch.setattr(replay, "rounded_up", lambda number: -(-max(number, 1) // 4) * 4)
    fell_back: list[bool] = []
    take = replay.Replay._replayed

    def noted(self: replay.Replay, recording: replay._Recording) -> bool:
        fits = take(self, recording)
        fell_back.append(not fits)
        return fits

    monkeypatch.setattr(replay.Replay, "_replayed", noted)
    replayed, _ = trained(architecture, data, chosen, tmp_path / "replayed")
    assert True in fell_back and False in fell_back
    check_equal(replayed, plain)


class Ending(IterableSource):
    """Ends after its batches."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from self._batches


def test_the_threshold_at_the_end_of_the_source_is_that_of_the_newest_batch() -> None:
    data = batches(24)
    plain = train(Ending(data), shape("batch_topk"), plainly(settings(24)))
    check_equal(train(Ending(data), shape("batch_topk"), settings(24)), plain)
    assert float(plain.get_parameter("threshold")) > 0
    assert replays() > 10


def test_room_has_few_sizes() -> None:
    sizes = {replay.rounded_up(number) for number in range(1_000_000)}
    assert len(sizes) == 1 + 4 * 8 and min(sizes) == 4096
    assert all(number <= replay.rounded_up(number) <= max(4096, 1.25 * number) for number in range(1, 1_000_000, 977))


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "relu"])
def test_a_resumed_training_records_again_and_is_the_uninterrupted_one(architecture: str, tmp_path: Path) -> None:
    data, chosen = batches(7), settings(40, checkpoint_every=17, keep_checkpoints=9)
    whole, _ = trained(architecture, data, chosen, tmp_path)
    lines = lines_of(tmp_path)
    for step in (34, 40):
        (tmp_path / "checkpoints" / f"step-{step:08d}" / "state.pt").unlink()
    before = replays()
    resumed, other_lines = trained(architecture, data, chosen, tmp_path)
    assert replays() > before
    check_equal(resumed, whole)
    for line, other in zip(lines, other_lines, strict=True):
        assert other == pytest.approx(line, rel=1e-6 if architecture in WITH_ROOM else 0, abs=0)
    state = torch.load(tmp_path / "checkpoints" / "step-00000017" / "state.pt", weights_only=True)
    assert all(isinstance(group["lr"], float) for group in state["optimizer"]["rest"]["param_groups"])


def test_a_training_begun_without_graphs_is_continued_with_them(tmp_path: Path) -> None:
    data, chosen = batches(7), settings(40, checkpoint_every=17, keep_checkpoints=9)
    whole, _ = trained("gated", data, plainly(chosen), tmp_path)
    for step in (34, 40):
        (tmp_path / "checkpoints" / f"step-{step:08d}" / "state.pt").unlink()
    resumed, _ = trained("gated", data, chosen, tmp_path)
    assert replays() > 0
    check_equal(resumed, whole)


def test_many_dictionaries_in_a_pass_are_those_trained_alone() -> None:
    data, chosen = batches(7), settings(24)
    recipes = {name: Recipe(shape(name), chosen) for name in ARCHITECTURES}
    together = train_all({"activations": IterableSource(data)}, recipes).dictionaries
    assert replays() > 0
    for name in ARCHITECTURES:
        check_equal(together[name], train(IterableSource(data), shape(name), plainly(chosen)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_that_is_not_finite_is_named(architecture: str) -> None:
    data = batches(40)
    data[21][3, 2] = torch.nan
    with pytest.raises(TrainingError, match=r"NaN at step 22, batch 21 \(tokens 336 to 352\): the activations"):
        train(IterableSource(data), shape(architecture), settings(40))
    assert replays() > 10


def test_batches_in_bfloat16_are_converted_in_the_step() -> None:
    """The same steps as on the same numbers in float32, and a batch of another dtype among them is no problem."""
    low = [x.bfloat16() for x in batches(7)]
    expected = train(IterableSource([x.float() for x in low]), shape("topk"), plainly(settings(30)))
    mixed = [x.float() if number == 5 else x for number, x in enumerate(low)]
    for data in (low, mixed):
        check_equal(_trained_as_stored(data, settings(30)), expected)
    assert replays() > 20


def _trained_as_stored(data: list[Tensor], chosen: TrainConfig) -> Dictionary:
    """Steps on batches of the dtypes they have."""
    config = shape("topk")
    source = IterableSource([x.float() for x in data])
    one = member.Member(trainer_module.Trainer(Recipe(config, chosen), source, None, 30, torch.device("cpu")))
    place = member.share_recorder([one], torch.device("cpu"))
    assert place is not None
    for step in range(30):
        one.step(place.keep({"x": data[step % 7]})["x"], None)
    return one.trainer.folded()


@pytest.mark.parametrize("fails", ["at once", "in the middle"])
def test_if_steps_cannot_be_recorded_training_continues_and_says_so(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, chosen = batches(7), settings(20)
    plain, lines = trained("gated", data, plainly(chosen), tmp_path / "plain")
    if fails == "at once":
        monkeypatch.setattr(Simulated, "begin", lambda self: (_ for _ in ()).throw(RuntimeError("CUDA error: no")))
    else:
        monkeypatch.setattr(recording, "CAPTURED", recording.CAPTURED - {"aten._fused_adam_.tensor_lr"})
    with pytest.warns(UserWarning, match="steps could not be recorded as CUDA graphs, so training continues without"):
        other, other_lines = trained("gated", data, chosen, tmp_path / "other")
    assert replays() == 0
    check_equal(other, plain)
    assert other_lines == lines


def test_if_memory_is_too_short_to_record_a_step_training_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little for a plain step is an error, which the command line explains."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    expected = train(IterableSource(batches(7)), shape("topk"), plainly(settings(20)))
    monkeypatch.setattr(Simulated, "begin", full)
    with pytest.warns(UserWarning, match="CUDA out of memory"):
        check_equal(train(IterableSource(batches(7)), shape("topk"), settings(20)), expected)
    monkeypatch.setattr(fixed_kernels, "select_topk", full)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        train(IterableSource(batches(7)), shape("topk"), settings(20))
