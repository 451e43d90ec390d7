"""A default device and a default number type that a program has set change no result, and stay as they were."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sae
from sae import superposition
from sae.activations import ActivationCache
from sae.activations.harvest import harvest
from sae.config.settings import FeaturesConfig, RunConfig
from sae.evaluation.recovery import measure_recovery
from sae.features import collect
from sae.model.language_model import LanguageModel
from sae.probing import ConceptConfig, ProbeConfig
from sae.superposition.dictionaries import RecoverySettings, run_recovery
from tests.conftest import make_tiny_config
from tests.support.quick import quick_for

HOOK = "blocks.1.hook_resid_pre"
TOKENS = torch.randint(1, 90, (2, 12), generator=torch.Generator().manual_seed(4))
PROBES = ProbeConfig(k=(1,), splits=1)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


DEFAULTS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "set_default_device": lambda: default_device("meta"),  # on which nothing has a value
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}


class Case:
    """What entry points are given."""

    def __init__(self, cache: ActivationCache, model: LanguageModel, config: RunConfig, folder: Path) -> None:
        self.cache, self.model, self.config, self.path = cache, model, config, folder
        self.dictionary = trained(self)
        self.transcoder = copy.deepcopy(self.dictionary)
        self.transcoder.metadata |= {"hook": HOOK, "target_hook": "blocks.2.hook_mlp_out"}
        self.settings = sae.EvaluationConfig(tokens=150, downstream_tokens=100, frozen_decoder_tokens=256)
        self.x = torch.randn(80, 32, generator=torch.Generator().manual_seed(2))
        self.labels = (self.x[:, 0] > 0).tolist()
        self.texts = folder / "texts.csv"
        rows = (f"the {'river' if number % 2 else 'stone'} number {number} opens,{number % 2}" for number in range(60))
        self.texts.write_text("\n".join(["text,label", *rows]), encoding="utf-8")
        self._folders = itertools.count()

    @property
    def folder(self) -> Path:
        return self.path / str(next(self._folders))

    def loader(self) -> sae.ActivationLoader:
        return sae.ActivationLoader(self.cache, HOOK, batch_size=64)


def trained(case: Case) -> sae.Dictionary:
    return sae.train(case.loader(), sae.DictionaryConfig(d_sae=48, k=4), sae.TrainConfig(tokens=1280))


def weights(dictionary: sae.Dictionary) -> list[Tensor]:
    return list(dictionary.state_dict().values())


def evaluated(case: Case, use: str) -> Any:
    options: dict[str, Any] = {"hook": HOOK, "language_model": case.model, "settings": case.settings}
    if use == "evaluate":
        return {**sae.evaluate(case.dictionary, case.cache, **options).to_json(), "seconds": 0}
    if use == "compare":
        return sae.compare({"one": case.dictionary, "two": case.dictionary}, case.cache, **options).to_json()
    reports = sae.evaluate_all({"one": case.dictionary}, case.cache, **options)
    return reports["one"].scores.to_json()


def collected(case: Case) -> Any:
    features = collect(
        case.dictionary, case.cache, case.folder, FeaturesConfig(tokens=500), hook=HOOK,
        tokenizer=case.model.tokenizer, language_model=case.model,
    )  # fmt: skip
    summary = features.summary()
    number = int(summary.density.argmax())
    return [*vars(summary).values(), features[number]]


def a_run(case: Case) -> Any:
    """Every stage, from text on; the language model is loaded too."""
    config = case.config.model_copy(update={"out": str(case.folder)})
    run = sae.run(config)
    sae.collect_features(run.folder)
    sae.verify(run.folder)
    report = {**json.loads((run.folder / "eval.json").read_bytes()), "seconds": 0}
    probes = sae.probe_run(run.folder, [case.texts], PROBES).results["texts"].to_json()
    found = sae.find(run.folder, data=case.texts, settings=ConceptConfig(permutations=19)).to_json()
    return [*weights(run.dictionary()), report, probes, found]


def exported(case: Case) -> list[str]:
    """The numbers that are computed for it: neurons and the histogram of logits."""
    features = collect(
        case.dictionary, case.cache, case.folder, FeaturesConfig(tokens=500), hook=HOOK,
        tokenizer=case.model.tokenizer, language_model=case.model,
    )  # fmt: skip
    options: dict[str, Any] = {"dictionary": case.dictionary, "language_model": case.model, "set_name": "a"}
    files = sae.export_features(features, case.folder, "saedashboard", indices=range(4), **options).files
    return [path.read_text(encoding="utf-8") for path in files]


def replaced(case: Case) -> Any:
    report = sae.measure_replacement({"one": case.transcoder}, case.cache, case.model, settings=case.settings)
    return {**report.to_json(), "seconds": 0}


def spliced(case: Case) -> Tensor:
    with sae.splice(case.model, case.dictionary):
        return case.model.logits(TOKENS)


def opened(case: Case) -> Any:
    words = ["data.tokens=500", "data.held_out_tokens=100", "harvest.dtype=float32"]
    run = sae.open_run(
        case.dictionary, words, model=case.config.model.name, data=case.config.data.sources, out=case.folder
    )  # fmt: skip
    return [run.cache().manifest.identity(HOOK), *weights(run.dictionary())]


def steered(case: Case) -> Any:
    with sae.steer(case.model, case.dictionary, {3: 4.0}, random=0):
        return [case.model.logits(TOKENS), case.model.generate(["the river", "a"], max_new_tokens=4)]


def toy_results() -> Any:
    settings = RecoverySettings(
        "even", features=24, d_in=12, mean_l0=2.0, d_sae=24, k=2, tokens=1280, batch_size=128, scored=200
    )
    scores = run_recovery(settings, 0).dictionaries[0].scores
    density, importance = (torch.full(shape, 0.5, dtype=torch.float32, device="cpu") for shape in ((2,), (2, 5)))
    toys = superposition.train_toy_models(density, importance, 2, superposition.ToyTraining(steps=20, batch_size=32))
    return [
        scores,
        toys.W,
        superposition.expected_loss(toys, 16),
        superposition.uneven_features().sample(8).activations,
    ]


ENTRIES: dict[str, Callable[[Case], Any]] = {
    "batches": lambda case: list(itertools.islice(case.loader(), 20)),
    "contexts": lambda case: [list(vars(one).values()) for one in case.cache.contexts("held_out", HOOK)],
    "statistics": lambda case: vars(case.cache.statistics(HOOK)),
    "train": lambda case: weights(trained(case)),
    "evaluate": lambda case: evaluated(case, "evaluate"),
    "evaluate_all": lambda case: evaluated(case, "evaluate_all"),
    "compare": lambda case: evaluated(case, "compare"),
    "features": collected,
    "measure_effects": lambda case: (
        sae.measure_effects(case.dictionary, case.cache, case.model, hook=HOOK, features=[1, 2, 3]).features
    ),
    "measure_replacement": replaced,
    "export_features": exported,
    "attribute": lambda case: sae.attribute(case.dictionary, case.model, TOKENS, steps=3).to_json(),
    "probe": lambda case: sae.probe(case.dictionary, case.x, case.labels, PROBES).to_json(),
    "splice": spliced,
    "steer": steered,
    "measure_steering": lambda case: sae.measure_steering(
        case.model, case.dictionary, ["the river", "a"], {3: 4.0}, max_new_tokens=4, seed=1
    ).to_json(),
    "text_features": lambda case: sae.text_features(case.dictionary, case.model, "the river and the stone"),
    "LanguageModel.of": lambda case: sae.LanguageModel.of(case.model.hf_model, case.model.tokenizer).info,
    "harvest": lambda case: harvest(
        case.config.model_copy(update={"out": str(case.folder)}), case.model
    ).manifest.identity(HOOK),
    "LanguageModel": lambda case: sae.LanguageModel(case.config.model.name).info,
    "hooks": lambda case: sae.LanguageModel(case.config.model.name).hooks(),
    "run": a_run,
    "open_run": opened,
    "recovery": lambda case: measure_recovery(case.dictionary.W_dec, case.x).scores,
    "superposition": lambda case: toy_results(),
}
WITHIN = {
    "harvest",
    "collect_features",
    "find",
    "probe_run",
    "replace",
    "verify",
    "train_all",
}  # others of these call them
ELSEWHERE = {
    "load",
    "load_all",
    "list_dictionaries",
    "pull",
    "push",
    "convert",
    "load_config",
    "sweep",
    "dictionary_metadata",
}  # tested apart, or they compute nothing themselves


@pytest.fixture(scope="module")
def case(
    tiny_cache: ActivationCache, tiny_model: Path, text_folder: Path, language_model: LanguageModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:  # fmt: skip
    folder = tmp_path_factory.mktemp("case")
    config = make_tiny_config(tiny_model, text_folder, folder / "run", {"evaluation.frozen_decoder_tokens": 256})
    return Case(tiny_cache, language_model, config, folder)


@pytest.fixture(scope="module")
def expected(case: Case) -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def of(entry: str) -> Any:
        if entry not in made:
            made[entry] = ENTRIES[entry](case)
        return made[entry]

    return of


@pytest.mark.parametrize("defaults", DEFAULTS)
@pytest.mark.parametrize("entry", quick_for(set(ENTRIES) - {"run"}, ENTRIES))
def test_defaults_change_nothing(entry: str, defaults: str, case: Case, expected: Callable[[str], Any]) -> None:
    wanted = expected(entry)
    with DEFAULTS[defaults]():
        before = torch.get_default_device(), torch.get_default_dtype()
        found = ENTRIES[entry](case)
        assert (torch.get_default_device(), torch.get_default_dtype()) == before
    torch.testing.assert_close(plain(found), plain(wanted), rtol=0, atol=0, equal_nan=True)


def plain(result: Any) -> Any:
    """Tensors, and text of what else there is."""
    if isinstance(result, list | tuple):
        return [plain(one) for one in result]
    if isinstance(result, dict):
        return {str(key): plain(one) for key, one in result.items()}
    return result if isinstance(result, Tensor) else torch.tensor(list(repr(result).encode()), device="cpu")


def test_every_public_function_is_tried() -> None:
    functions = {name for name in sae.__all__ if inspect.isfunction(getattr(sae, name))}
    assert functions == (functions & ENTRIES.keys()) | WITHIN | ELSEWHERE


def test_the_caller_s_defaults_hold_where_batches_are_used(case: Case) -> None:
    """And a reader that is left in the middle ends."""
    with default_device("meta"):
        for batch in case.loader():
            assert (batch.device.type, torch.zeros(1).device.type) == ("cpu", "meta")
            break
        for read in case.cache.contexts():
            assert (read.tokens.device.type, torch.zeros(1).device.type) == ("cpu", "meta")
            break
