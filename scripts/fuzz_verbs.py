"""Commands of the toolkit, and its Python interface, run on a folder that holds a small `run`, by name (`VERBS`)."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

SETTINGS = [
    "data.tokens=6000", "data.held_out_tokens=2000", "data.context_length=64", "harvest.shard_contexts=32",
    "dictionary.d_sae=32", "dictionary.k=4", "train.batch_size=256", "train.checkpoint_every=8", "train.log_every=4",
    "features.tokens=3000", "evaluation.downstream_tokens=256", "evaluation.tokens=512", "evaluation.legacy_tokens=0",
    "evaluation.frozen_decoder_tokens=0", "evaluation.baseline_tokens=128",
]  # fmt: skip
SLOW_IMPORTS = ("datasets", "transformers", "matplotlib.pyplot")
EFFECTS = ["--positions", "2", "--null-positions", "1", "--window", "2", "--tokens", "512"]
PROBES = ["k=1", "examples=40", "max_tokens=16", "splits=1"]


def run_verb(verb: str, config: Path) -> None:
    """In a folder that holds `run`."""
    if verb == "load":
        load_in_python()
        return
    if verb == "resume":
        shutil.rmtree("run/dictionary")
    if verb == "finish eval":
        report = Path("run/eval.json")
        report.rmdir() if report.is_dir() else report.unlink(missing_ok=True)
    if verb == UNFINISHED:
        leave_evaluation_unfinished()
        return
    command = {
        "verify": ["verify", "run"],
        "run": ["run", str(config), "out=run", *SETTINGS],
        "resume": ["train", str(config), "out=run", *SETTINGS],
        "eval": ["eval", "run"],
        "finish eval": ["eval", "run"],
        "features": ["features", "run", "--limit", "5"],
        "features N": ["features", "run", "3"],
        "compare": ["compare", "run", "run/checkpoints/step-00000016", "--out", "run/compared"],
        "effects": ["effects", "run", "3", *EFFECTS],
        "probe": ["probe", "run", str(config.with_name("labels.csv")), *PROBES],
    }[verb]
    from sae.cli import main as cli

    sys.argv = ["sae", "--quiet", *command]
    cli.main()


VERBS = (
    "verify", "run", "resume", "eval", "finish eval", "features", "features N", "compare", "effects", "probe", "load",
)  # fmt: skip
CAN_BE_MISSING = {"metrics.jsonl": ("resume", "eval", "finish eval"), "effects.json": ("features N",)}
"""Files that a verb does without, and says so."""
UNFINISHED = "leave an evaluation unfinished"


def leave_evaluation_unfinished() -> None:
    """Beside the report, which is as before: what Ctrl-C keeps of an evaluation after it wrote sums twice."""
    from sae.evaluation import partial
    from sae.evaluation.partial import FOLDER, Stage
    from sae.runs.run import Run

    report, keep, kept = Path("run/eval.json"), Stage.keep, []

    def interrupted(self: Stage) -> None:
        keep(self)
        kept.append(self)
        if len(kept) == 2:
            raise KeyboardInterrupt

    content = report.read_bytes()
    report.unlink()
    Stage.keep, partial.EVERY = interrupted, 0.0
    with contextlib.suppress(KeyboardInterrupt):
        Run.open("run").evaluate()
    report.write_bytes(content)
    assert list(Path("run", FOLDER).rglob("*.safetensors"))


def load_in_python() -> None:
    import torch

    import sae

    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"
    try:
        dictionary = sae.load("run")
        cache = sae.ActivationCache("run")
        [hook] = cache.hooks
        total = sum(float(dictionary(batch.activations).double().sum()) for batch in cache.contexts("held_out", hook))
        first = next(iter(sae.ActivationLoader(cache, hook, batch_size=64)))
        print(total, float(first.sum()), len(cache.documents()), sae.Features("run")[3], torch.__version__)
    except sae.SaeError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)


def share_language_model(config: Path) -> None:
    """Import what takes long and load the model of `config` once, for all forks."""
    for name in (
        "sae.cli.main",
        "sae.runs.comparison",
        "sae.runs.probes",
        "sae.runs.verification",
        "sae.viewer",
        *SLOW_IMPORTS,
    ):
        importlib.import_module(name)
    import torch

    from sae.config.file import load_config
    from sae.model.language_model import LanguageModel
    from sae.runs import run

    kept: dict[str, LanguageModel] = {}

    def shared(settings: Any, device: Any) -> LanguageModel:
        key = f"{settings.model_dump_json()} {device}"
        if key not in kept:
            kept[key] = LanguageModel(settings, device)
        return kept[key]

    run.LanguageModel = shared  # pyright: ignore[reportAttributeAccessIssue]
    torch.set_num_threads(1)  # a fork has no others
    assert run.Run(load_config(config, SETTINGS)).language_model in kept.values()
