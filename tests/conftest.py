"""What all tests share: shapes checked, no network, a tiny language model, text, and a cache of its activations."""

from __future__ import annotations

import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false",
}

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jaxtyping


def checked_modules(folder: Path, name: str) -> Iterator[str]:
    """All modules but the kernels of Triton and Numba, which are compiled from their source as it stands."""
    for path in folder.iterdir():
        inner = f"{name}.{path.stem}"
        if inner == "sae.kernels":
            yield from checked_modules(path, inner)
        elif path.suffix == ".py" or (path / "__init__.py").is_file():
            yield from [inner] if inner not in ("sae.kernels.triton", "sae.kernels.numba") else []


jaxtyping.install_import_hook(  # before anything imports sae
    list(checked_modules(Path(__file__).parents[1] / "sae", "sae")), "beartype.beartype"
)


class CheckedCalls:
    """Shapes and types are checked in the first `LIMIT` calls of a test: a training repeats them for minutes."""

    LIMIT = 2000

    def __init__(self) -> None:
        self.count = 0

    def over(self, _: object) -> bool:
        self.count += 1
        return self.count > self.LIMIT


CHECKED_CALLS = CheckedCalls()
type(jaxtyping.config).jaxtyping_disable = property(CHECKED_CALLS.over)  # type: ignore[attr-defined]

import pytest
import torch

from sae.activations import ActivationCache
from sae.activations.harvest import harvest
from sae.cli import main as cli
from sae.config.file import parse_config
from sae.config.settings import RunConfig
from sae.config.sources import ModelConfig
from sae.kernels import products
from sae.model.language_model import LanguageModel

torch.set_num_threads(1)  # with tensors this small, threads only wait for each other
products.cpu_has_bfloat16 = lambda: False  # results do not depend on the processor, except in tests of this

CHROMIUM = Path("/usr/bin/chromium")
SPECIAL = "<|endoftext|>"
WORDS = """
the a one every this river stone house letter winter garden engine mother number silver road window question
of in under over beside against after before finds keeps opens breaks carries remembers follows answers writes
slowly never often quietly again and but because while although red old heavy bright small certain
""".split()

TinyConfig = Callable[..., RunConfig]


class Outcome(NamedTuple):
    """What a command left."""

    status: int
    out: str
    err: str


Command = Callable[..., Outcome]


def assert_refused(outcome: Outcome, *parts: str) -> None:
    """One line that says what is wrong, and status 1."""
    assert outcome.status == 1, outcome.out + outcome.err
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("Error: ")
    for part in parts:
        assert part in lines[0], lines[0]
    assert "Traceback" not in outcome.err


def write_text_folder(folder: Path, documents: int = 60, seed: int = 0) -> Path:
    """Some dozens of small documents of random sentences, no two alike."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        lines = [
            " ".join(rng.choices(WORDS, k=rng.randint(4, 12))).capitalize() + "." for _ in range(rng.randint(8, 24))
        ]
        (folder / f"{number:03d}.txt").write_text(f"Document {number}\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_tiny_model(folder: Path, texts: Path, seed: int = 0) -> Path:
    """A random GPT-2 of three blocks, and a byte-level BPE tokenizer learnt from `texts`."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train([str(path) for path in sorted(texts.iterdir())], vocab_size=400, special_tokens=[SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=SPECIAL, eos_token=SPECIAL)
    tokenizer.save_pretrained(folder)
    config = GPT2Config(
        n_embd=32, n_layer=3, n_head=2, n_positions=64, vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
        for name, parameter in model.named_parameters():  # off GPT-2's initial 0 and 1, so that every part matters
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
            elif "wte" not in name and "wpe" not in name:
                parameter.data *= 6
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def shapes_are_checked() -> None:
    CHECKED_CALLS.count = 0


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of .txt files. Read only."""
    return write_text_folder(tmp_path_factory.mktemp("text") / "corpus")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    """A folder with a tiny GPT-2 and its tokenizer. Read only."""
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", text_folder)


@pytest.fixture(scope="session")
def language_model(tiny_model: Path) -> LanguageModel:
    """The tiny model, loaded. Whoever changes its weights puts them back."""
    return LanguageModel(ModelConfig(name=str(tiny_model)))


def make_tiny_config(tiny_model: Path, text_folder: Path, out: Path, overrides: dict[str, Any]) -> RunConfig:
    """A run of seconds; overrides are `{"data.tokens": 100}`, or `data__tokens=100` as keywords."""
    settings: dict[str, dict[str, Any]] = {
        "model": {"name": str(tiny_model)},
        "data": {
            "source": str(text_folder), "tokens": 1000, "held_out_tokens": 200, "holdout_fraction": 0.25,
            "context_length": 16,
        },
        "harvest": {
            "hooks": ["blocks.1.hook_resid_pre"], "dtype": "float32", "batch_contexts": 4, "shard_contexts": 8,
        },
        "dictionary": {"d_sae": 64, "k": 4},
        "train": {"batch_size": 64, "pool_tokens": 256, "log_every": 5, "checkpoint_every": 10},
    }  # fmt: skip
    top: dict[str, Any] = {"out": str(out)}
    for key, value in overrides.items():
        section, dot, name = key.replace("__", ".").partition(".")
        if dot:
            settings.setdefault(section, {})[name] = value
        else:
            top[section] = value
    return parse_config({**top, **settings})


@pytest.fixture
def tiny_config(tiny_model: Path, text_folder: Path, tmp_path: Path) -> TinyConfig:
    """Makes the configuration of a tiny run in this test's folder: `tiny_config(data__tokens=500)`."""
    return lambda **overrides: make_tiny_config(tiny_model, text_folder, tmp_path / "run", overrides)


@pytest.fixture(scope="session")
def tiny_cache(
    tiny_model: Path, text_folder: Path, language_model: LanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> ActivationCache:
    """Two hook points of the tiny model, float32, in shards of 8 contexts, the last one ragged. Read only."""
    overrides = {"harvest.hooks": ["blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out"]}
    config = make_tiny_config(tiny_model, text_folder, tmp_path_factory.mktemp("cache") / "run", overrides)
    return harvest(config, language_model)


ShortDocuments = Callable[..., ActivationCache]


@pytest.fixture(scope="session")
def short_documents(
    tiny_model: Path, text_folder: Path, language_model: LanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> ShortDocuments:
    """Makes float32 caches whose documents are single lines of the text, so that the held-out split has many.

    `short_documents(lines=8, data__tokens=1000)`: `lines` of each file, and overrides as of `tiny_config`.
    """

    def make(lines: int, **overrides: Any) -> ActivationCache:
        folder = tmp_path_factory.mktemp("short")
        (folder / "text").mkdir()
        for path in text_folder.iterdir():
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[:lines]):
                (folder / "text" / f"{path.stem}-{number}.txt").write_text(f"{line}\n", encoding="utf-8")
        return harvest(make_tiny_config(tiny_model, folder / "text", folder / "run", overrides), language_model)

    return make


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Calls `sae --quiet` with arguments, as from a terminal."""

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["sae", "--quiet", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            cli.main()
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, driven by Playwright."""
    if not CHROMIUM.exists():
        pytest.skip("chromium is not installed")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()
