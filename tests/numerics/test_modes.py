"""PyTorch's modes around the toolkit: it gives the same inside them, and leaves them as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sae
from sae.architectures import ARCHITECTURES
from sae.probing import ProbeConfig
from sae.superposition import ToyTraining, train_toy_models
from sae.superposition.dictionaries import RecoverySettings, run_recovery
from tests.support.evaluation_cache import make_cache, random_rows
from tests.support.fake_cache import HOOK


@contextlib.contextmanager
def switched_off() -> Iterator[None]:
    """As in the first line of many notebooks."""
    torch.set_grad_enabled(False)
    try:
        yield
    finally:
        torch.set_grad_enabled(True)


MODES: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "set_grad_enabled(False)": switched_off,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}
modes = pytest.mark.parametrize("mode", MODES)


def state() -> tuple[bool, bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")


def trained(architecture: str, start: sae.Dictionary | None = None, folder: Path | None = None) -> sae.Dictionary:
    """Batches, settings and start are made in the caller's mode, as a notebook makes them."""
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(32, 8, generator=generator) + 0 for _ in range(4)]
    shape = sae.DictionaryConfig.model_validate({"architecture": architecture, "d_sae": 32, "k": 2})
    settings = sae.TrainConfig(tokens=640, checkpoint_every=10, log_every=5)
    return sae.train(sae.IterableSource(batches), shape, settings, start=start, folder=folder)


@modes
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_is_the_same_in_every_mode(architecture: str, mode: str, tmp_path: Path) -> None:
    expected = trained(architecture)
    with MODES[mode]():
        before = state()
        found = trained(architecture, folder=tmp_path / "run")
        continued = trained(architecture, start=found)
        assert state() == before
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), found.parameters(), strict=True))
    x = torch.randn(5, 8, requires_grad=True)
    for dictionary in (found, continued):
        assert not any(parameter.is_inference() for parameter in dictionary.parameters())
        dictionary.requires_grad_(True)(x).sum().backward()  # what was trained there can be trained on here
        assert dictionary.W_dec.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_does_not_depend_on_the_default_number_type(architecture: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(32, 8, generator=generator) for _ in range(4)]
    seen = []

    class Source:
        def __iter__(self) -> Iterator[Tensor]:
            for batch in batches:
                seen.append(torch.get_default_dtype())
                yield batch

    def made() -> sae.Dictionary:
        shape = sae.DictionaryConfig.model_validate({"architecture": architecture, "d_sae": 32, "k": 2})
        return sae.train(sae.IterableSource(Source()), shape, sae.TrainConfig(tokens=256))

    expected = made()
    seen.clear()
    torch.set_default_dtype(dtype)
    try:
        found = made()
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert set(seen) == {dtype}, "the caller's own code runs as the caller set it"
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), found.parameters(), strict=True))


def test_training_does_not_depend_on_the_default_device() -> None:
    expected = trained("batch_topk")
    with torch.device("meta"):
        generator = torch.Generator().manual_seed(1)
        batches = [torch.randn(32, 8, generator=generator, device="cpu") + 0 for _ in range(4)]
        shape = sae.DictionaryConfig.model_validate({"architecture": "batch_topk", "d_sae": 32, "k": 2})
        settings = sae.TrainConfig(tokens=640, checkpoint_every=10, log_every=5)
        found = sae.train(sae.IterableSource(batches), shape, settings)
        assert torch.get_default_device().type == "meta"
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), found.parameters(), strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("saved", [torch.float64, torch.float32, torch.bfloat16])
def test_loading_keeps_every_bit_of_every_number_type(architecture: str, saved: torch.dtype, tmp_path: Path) -> None:
    made = trained(architecture).to(saved)
    with torch.no_grad():
        made.W_enc += torch.rand_like(made.W_enc) / 1024
    made.save(tmp_path)
    before = torch.get_default_dtype()
    for default in (torch.float64, torch.float32, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            with torch.device("meta"):
                found = sae.load(tmp_path)
        finally:
            torch.set_default_dtype(before)
        for (name, expected), parameter in zip(made.named_parameters(), found.parameters(), strict=True):
            assert parameter.dtype == saved and not parameter.requires_grad, name
            assert torch.equal(parameter, expected), (name, default)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_loaded_in_inference_mode_has_ordinary_weights(architecture: str, tmp_path: Path) -> None:
    trained(architecture).save(tmp_path)
    with torch.inference_mode():
        loaded = sae.load(tmp_path)
        assert torch.is_inference_mode_enabled()
        assert torch.equal(loaded(torch.ones(2, 8)), sae.load(tmp_path)(torch.ones(2, 8)))
    x = torch.randn(5, 8, requires_grad=True)
    loaded.encode(x).sum().backward()
    assert x.grad is not None
    loaded.normalise_decoder_()
    trained(architecture, start=loaded)
    loaded.requires_grad_(True)(x).sum().backward()


@pytest.mark.parametrize("moved", [None, torch.float64])
def test_training_starts_from_weights_that_were_made_in_inference_mode(moved: torch.dtype | None) -> None:
    source = trained("topk")
    with torch.inference_mode():
        start = sae.TopK(8, 32, k=2)
        start.load_state_dict(source.state_dict())
    expected = trained("topk", start=source)
    found = trained("topk", start=start if moved is None else start.to(moved))
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), found.parameters(), strict=True))


@modes
def test_a_source_is_read_in_the_caller_s_mode(mode: str) -> None:
    """It may run a language model, of which nothing is to be recorded and whose precision the caller chose."""
    seen = []

    class Live:
        def __iter__(self) -> Iterator[Tensor]:
            for _ in range(4):
                seen.append(state())
                yield torch.ones(8, 4).cumsum(0) @ model

    model = torch.eye(4, requires_grad=True)
    with MODES[mode]():
        before = state()
        sae.train(sae.IterableSource(Live()), sae.DictionaryConfig(d_sae=8, k=2), sae.TrainConfig(tokens=32))
    assert set(seen) == {before}
    assert model.grad is None, "training reached into the model that the activations come from"


@modes
def test_evaluation_is_the_same_in_every_mode(mode: str, tmp_path: Path) -> None:
    """With all its baselines, one of which is trained."""
    cache = make_cache(tmp_path, random_rows(600, 8, 6))
    dictionary = trained("topk")
    settings = sae.EvaluationConfig(frozen_decoder_tokens=256)
    expected = sae.evaluate(dictionary, cache, hook=HOOK, settings=settings)
    with MODES[mode]():
        before = state()
        found = sae.evaluate(dictionary, cache, hook=HOOK, settings=settings)
        assert state() == before
    ours, theirs = ({**report.to_json(), "seconds": 0} for report in (found, expected))
    assert ours == theirs


@modes
def test_toy_models_and_recovery_are_the_same_in_every_mode(mode: str) -> None:
    def toys() -> Tensor:
        made = train_toy_models(torch.tensor([0.1, 0.5]), torch.ones(2, 5), 2, ToyTraining(steps=20, batch_size=32))
        return made.W

    settings = RecoverySettings(
        "even", features=24, d_in=12, mean_l0=2.0, d_sae=24, k=2, tokens=1280, batch_size=128, scored=200
    )
    directions = toys()
    scores = run_recovery(settings, 0).dictionaries[0].scores
    with MODES[mode]():
        assert torch.equal(toys(), directions)
        assert run_recovery(settings, 0).dictionaries[0].scores == scores


@modes
def test_probes_are_the_same_in_every_mode(mode: str) -> None:
    x = torch.randn(80, 8, generator=torch.Generator().manual_seed(2))
    labels = (x[:, 0] > 0).tolist()
    dictionary = trained("topk").requires_grad_(True)
    settings = ProbeConfig(k=(1,), splits=1)
    expected = sae.probe(dictionary, x, labels, settings).to_json()
    with MODES[mode]():
        assert sae.probe(dictionary, x, labels, settings).to_json() == expected
