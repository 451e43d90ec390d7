"""Speed of harvesting, on this machine.

    python benchmarks/harvest.py --json harvest.json

Tokens per second of `sae.activations.harvest.harvest` compared with the bare model: transformers' own modules
with fused attention, in the same number type, over the same batches, up to the hook point, with nothing done to the
result. Both in one process, in turns. Target: at least 0.95 of the bare model on a CPU, 0.9 on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from sae.activations import ActivationCache
from sae.activations.harvest import harvest
from sae.activations.manifest import DOCUMENTS, MANIFEST, FileEntry, HookEntry, Manifest, shard_name
from sae.config.file import parse_config
from sae.config.settings import RunConfig
from sae.dictionary.model_identity import DEMO_FOLDER
from sae.model.language_model import LanguageModel

HOOK = "blocks.0.hook_resid_pre"
TYPES = (("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "int8"))
"""Number types of the model and of the stored activations."""


@dataclass(frozen=True)
class HarvestSpeed:
    """Medians over the repeats, in tokens per second; the ratio is the median of the repeats' own ratios."""

    model: str
    model_type: str
    stored_type: str
    hook: str
    reader: str
    tokens: int
    bare: float
    harvest: float
    ratio: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model to harvest; default: random weights in GPT-2 small's shape")
    parser.add_argument("--tokenizer", type=Path, help="folder of its tokenizer; default: the demo's, or a new one")
    parser.add_argument("--layer", type=int, default=8, help="block whose input is harvested")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens per harvest")
    parser.add_argument("--repeats", type=int, default=3, help="turns of bare loop and harvest")
    parser.add_argument("--types", nargs="+", default=[stored for _, stored in TYPES], help="number types as stored")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    arguments = parser.parse_args()

    results: dict[str, Any] = {"machine": describe_machine()}
    print(results["machine"])
    with tempfile.TemporaryDirectory() as folder:
        chosen = [types for types in TYPES if types[1] in arguments.types]
        speeds = [time_harvest(Path(folder), arguments, *types) for types in chosen]
        results["harvest"] = [asdict(speed) for speed in speeds]
        for numbers in results["harvest"]:
            print_table(numbers)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def time_harvest(folder: Path, arguments: argparse.Namespace, model_type: str, stored_type: str) -> HarvestSpeed:
    """Bare model and harvest in turns, over the same batches of the same text."""
    model = arguments.model or str(write_random_gpt2(folder / "gpt2-shape", arguments.tokenizer))
    config = harvest_config(model, arguments, folder / "run", model_type=model_type, stored_type=stored_type)
    language_model = LanguageModel(config.model, arguments.device)
    bare = bare_model(model, model_type, arguments.device)
    bare_rates, harvest_rates = [], []
    for turn in range(arguments.repeats + 1):  # the first warms up and is not counted
        shutil.rmtree(folder / "run", ignore_errors=True)
        cache, harvest_seconds = timed_harvest(config, language_model)
        bare_seconds = time_bare_model(cache, bare, config, arguments)
        if turn:
            rows = cache.rows("train") + cache.rows("held_out")
            harvest_rates.append(rows / harvest_seconds)
            bare_rates.append(rows / bare_seconds)
    return HarvestSpeed(
        model=language_model.info.name,
        model_type=model_type,
        stored_type=stored_type,
        hook=config.harvest.hooks[0],
        reader=language_model.reader(config.harvest.hooks),
        tokens=config.data.tokens + config.data.held_out_tokens,
        bare=statistics.median(bare_rates),
        harvest=statistics.median(harvest_rates),
        ratio=statistics.median(ours / bare for ours, bare in zip(harvest_rates, bare_rates, strict=True)),
    )


def timed_harvest(config: RunConfig, language_model: LanguageModel) -> tuple[ActivationCache, float]:
    """A whole harvest and its seconds from the first forward pass on: reading text is the same for everybody."""
    begun: list[float] = []
    original = language_model.activations

    def activations(tokens: torch.Tensor, hooks: Any) -> dict[str, torch.Tensor]:
        if tokens.shape[1] > 2 and not begun:  # two tokens: the width is being asked for
            begun.append(time.perf_counter())
        return original(tokens, hooks)

    language_model.activations = activations
    try:
        cache = harvest(config, language_model)
    finally:
        del language_model.activations
    return cache, time.perf_counter() - begun[0]


class ReachedError(Exception):
    """Ends a pass of the bare model at the block whose input is harvested."""


def bare_model(name: str, model_type: str, device: str) -> Any:
    """The model without its head, from transformers alone."""
    from transformers import AutoModelForCausalLM

    path = DEMO_FOLDER if name == "demo" else name
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, model_type), attn_implementation="sdpa")
    return model.base_model.to(device).eval().requires_grad_(False)


def time_bare_model(cache: ActivationCache, model: Any, config: RunConfig, arguments: argparse.Namespace) -> float:
    """Seconds of the same batches through the blocks before the hook point, with nothing done to the result."""
    length, batch = config.data.context_length, config.harvest.batch_contexts
    batches = []
    for split in ("train", "held_out"):
        for number in range(cache.shards(split)):
            tokens = load_file(cache.path / shard_name("tokens", split, number))["tokens"].long()
            batches += [part.view(-1, length).to(arguments.device) for part in tokens.split(batch * length)]
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))

    def stop(*_: Any) -> None:
        raise ReachedError

    with blocks[arguments.layer].register_forward_pre_hook(stop), torch.no_grad():
        begun = time.perf_counter()
        for tokens in batches:
            with contextlib.suppress(ReachedError):
                model(tokens, use_cache=False)
        if arguments.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - begun


def harvest_config(
    model: str, arguments: argparse.Namespace, out: Path, held_out: int | None = None, *, model_type: str = "float32",
    stored_type: str = "float16",
) -> RunConfig:  # fmt: skip
    context_length, batch_contexts = 128, 16
    held_out = held_out or context_length * batch_contexts
    return parse_config(
        {
            "out": str(out),
            "model": {"name": model, "dtype": model_type},
            "data": {"tokens": arguments.tokens, "held_out_tokens": held_out, "context_length": context_length},
            "harvest": {
                "hooks": [f"blocks.{arguments.layer}.hook_resid_pre"],
                "dtype": stored_type,
                "batch_contexts": batch_contexts,
                "shard_contexts": 2 * batch_contexts,
            },
        }
    )


def write_random_gpt2(folder: Path, tokenizer_folder: Path | None) -> Path:
    """Twelve blocks of width 768 with random weights; the tokenizer only has to make ids."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    if tokenizer_folder is None and (DEMO_FOLDER / "tokenizer.json").is_file():
        tokenizer_folder = DEMO_FOLDER
    if tokenizer_folder is not None:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    else:
        from tokenizers import ByteLevelBPETokenizer

        from sae.text.corpus import standard_library

        bpe = ByteLevelBPETokenizer()
        texts = (document.text for document, _ in zip(standard_library(), range(200), strict=False))
        bpe.train_from_iterator(texts, vocab_size=4096, special_tokens=["<|endoftext|>"], show_progress=False)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bpe._tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
        )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    return folder


def write_synthetic_cache(folder: Path, rows: int, d_in: int = 768, context_length: int = 128) -> Path:
    """A complete float16 cache with random activations and one BOS a context."""
    shard_contexts = 1024
    shard_rows = shard_contexts * context_length
    noise = torch.randn(shard_rows, d_in).half()
    files = {}
    for number, first in enumerate(range(0, rows, shard_rows)):
        count = min(shard_rows, rows - first)
        tokens = torch.arange(count, dtype=torch.int32) % context_length
        for kind, tensors in (
            ("tokens", {"tokens": tokens, "documents": torch.zeros_like(tokens)}),
            (HOOK, {"activations": noise[:count].roll(number, 0)}),
        ):
            name = shard_name(kind, "train", number)
            files[name] = write_entry(folder / name, save(tensors), count)
    files[DOCUMENTS] = write_entry(folder / DOCUMENTS, b'{"train": ["noise"], "held_out": []}', 1)
    counted = rows - rows // context_length
    manifest = Manifest(
        complete=True,
        model={"name": "synthetic"},
        data={},
        tokens={"prepend_bos": True, "masked_positions": 1, "masked_ids": [0]},
        context_length=context_length,
        shard_contexts=shard_contexts,
        dtype="float16",
        rows={"train": rows, "held_out": 0},
        text_sha256="",
        hooks={HOOK: HookEntry(d_in=d_in, tokens=counted, sum=[0.0] * d_in, sum_of_squares=counted * d_in)},
        files=files,
    )
    (folder / MANIFEST).write_text(json.dumps(manifest.to_json()), encoding="utf-8")
    return folder


def write_entry(path: Path, content: bytes, rows: int) -> FileEntry:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return FileEntry(rows=rows, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def describe_machine() -> str:
    load = os.getloadavg()[0]
    precision = torch.get_float32_matmul_precision()  # "highest": no TF32
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), load {load:.1f}, torch {torch.__version__}, "
        f"float32 products: {precision}"
    )


def print_table(numbers: dict[str, Any]) -> None:
    print()
    for key, value in numbers.items():
        print(f"{key:>22}  {value:,.3f}" if isinstance(value, float) else f"{key:>22}  {value}")


if __name__ == "__main__":
    main()
