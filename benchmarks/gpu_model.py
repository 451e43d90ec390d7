"""What a language model takes part in, on a GPU: the harvest, evaluation; and the pass that collects features.

The model has random weights in GPT-2 small's shape, which cost what trained ones cost; the text is random token ids.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ceilings import synchronise
from evaluation import dictionary
from gpu_parts import Context, PartSkipped
from gpu_timing import medians
from harvest import HOOK, timed_harvest, write_random_gpt2, write_synthetic_cache

from sae import ActivationCache, EvaluationConfig, LanguageModel
from sae.activations.harvest import harvest as harvest_activations
from sae.config.file import parse_config
from sae.config.settings import FeaturesConfig, RunConfig
from sae.config.sources import ComputeDtype, ModelConfig
from sae.config.splits import HELD_OUT, TRAIN
from sae.errors import SaeError
from sae.evaluation import evaluate_all
from sae.features.collection import scan


@dataclass(frozen=True)
class Sizes:
    """The blocks that are run, contexts per batch to choose from, tokens of the text, the dictionary, the passes."""

    layer: int
    contexts: Sequence[int]
    tokens: int
    held_out: int
    d_in: int
    d_sae: int
    k: int
    scanned: int
    length: int = 128


REAL = Sizes(8, (32, 128, 512), 1_048_576, 131_072, 768, 24_576, 32, 524_288)
DRY = Sizes(2, (2, 4), 1024, 512, 32, 256, 4, 2048, 32)
IDS = 4000
"""Token ids of the text are below this, and known to any tokenizer that the model may have."""


def sizes_of(context: Context) -> Sizes:
    return DRY if context.dry else REAL


def write_model(context: Context) -> Path:
    """A folder with the model, made once; a dry run's is small."""
    from unittest import mock

    from transformers import GPT2Config

    folder, sizes = context.folder / "model", sizes_of(context)
    if not folder.is_dir():
        if context.dry:
            small = GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=IDS + 1000, n_positions=sizes.length)
            with mock.patch("transformers.GPT2Config", lambda: small):
                write_random_gpt2(folder, None)
        else:
            write_random_gpt2(folder, None)
    return folder


def write_text(context: Context, tokens: int) -> Path:
    """Documents of 500 random token ids, one a line, some more than asked for; written once."""
    path = context.folder / "ids.jsonl"
    if path.is_file():
        return path
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, IDS, (tokens // 500 + 64, 500), generator=generator)
    path.write_text("".join(f'{{"ids": {row}}}\n' for row in ids.tolist()), encoding="utf-8")
    return path


def model_config(context: Context, out: Path, **sections: dict[str, Any]) -> RunConfig:
    """A run on the model and the text; `sections` are settings of the configuration's sections."""
    sizes = sizes_of(context)
    text = write_text(context, 2 * (sizes.tokens + sizes.held_out))
    settings: dict[str, dict[str, Any]] = {
        "model": {"name": str(write_model(context))},
        "data": {
            "source": str(text), "column": "ids", "tokens": sizes.tokens, "held_out_tokens": sizes.held_out,
            "context_length": sizes.length, "holdout_fraction": 0.25,
        },
        "harvest": {"hooks": [f"blocks.{sizes.layer}.hook_resid_pre"]},
    }  # fmt: skip
    for name, section in sections.items():
        settings[name] = {**settings.get(name, {}), **section}
    return parse_config({"out": str(out), "device": context.device, **settings})


def loaded(context: Context, dtype: ComputeDtype) -> LanguageModel:
    """The model as this package loads it.

    Raises:
        PartSkipped: what it needs for that is not installed.
    """
    try:
        return LanguageModel(ModelConfig(name=str(write_model(context)), dtype=dtype), context.device)
    except (ImportError, SaeError) as error:
        raise PartSkipped(f"the language model cannot be loaded: {error}") from None


def harvest(context: Context) -> None:
    """The whole harvest, and its passes of the model alone, compared with the bare model; the best batch of each."""
    sizes = sizes_of(context)
    for dtype in ("bfloat16", "float32"):
        what = f"blocks 0–{sizes.layer - 1}, {dtype}"
        bare = bare_rate(context, dtype)
        context.emit(f"bare {dtype}", {"what": f"transformers' own model, {what}", "tokens_per_second": bare})
        language_model = loaded(context, dtype)
        beside = {"beside": "transformers' own model", "beside_tokens_per_second": bare}
        passes = best_rate(context, partial(language_model.activations, hooks=[f"blocks.{sizes.layer}.hook_resid_pre"]))
        context.emit(f"passes {dtype}", {"what": f"our passes alone, {what}", "tokens_per_second": passes, **beside})
        whole = 0.0
        for contexts in sizes.contexts:
            whole = max(whole, harvest_rate(context, language_model, dtype, contexts))
            row = {"what": f"whole harvest to disk, {what}", "tokens_per_second": whole, **beside}
            context.emit(f"harvest {dtype}", row)
        del language_model


def bare_rate(context: Context, dtype: str) -> float:
    """Tokens per second of transformers' GPT-2 with fused attention, cut off after the blocks, its output dropped."""
    from transformers import GPT2LMHeadModel

    sizes = sizes_of(context)
    whole = GPT2LMHeadModel.from_pretrained(
        write_model(context), dtype=getattr(torch, dtype), attn_implementation="sdpa", local_files_only=True
    )
    model: Any = whole.transformer.to(context.device).eval()  # type: ignore[arg-type]
    del model.h[sizes.layer :]
    model.ln_f = torch.nn.Identity()
    return best_rate(context, lambda ids: model(input_ids=ids, use_cache=False))


def best_rate(
    context: Context, forward: Callable[[torch.Tensor], object], batches: Sequence[int] | None = None
) -> float:
    """Tokens per second with the best of some numbers of contexts in a batch."""
    sizes, found = sizes_of(context), []
    generator = torch.Generator().manual_seed(0)
    for contexts in batches or sizes.contexts:
        shape = (contexts, sizes.length)
        inputs = [torch.randint(10, IDS, shape, generator=generator).to(context.device) for _ in range(4)]
        with torch.inference_mode():
            seconds = medians({"it": forward}, inputs, context.device, 3 if context.dry else 9)["it"]
        found.append(contexts * sizes.length / seconds)
    return max(found)


def harvest_rate(context: Context, language_model: LanguageModel, dtype: str, contexts: int) -> float:
    """Tokens per second of a harvest from its first pass on, stored as float16: reading text is the same for all."""
    out = context.folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    shard = {"batch_contexts": contexts, "shard_contexts": max(contexts, 1024)}
    config = model_config(context, out, model={"dtype": dtype}, harvest=shard)
    cache, seconds = timed_harvest(config, language_model)
    rows = cache.rows(TRAIN) + cache.rows(HELD_OUT)
    shutil.rmtree(out, ignore_errors=True)
    return rows / seconds


def features(context: Context) -> None:
    """The pass over a cache that collects features, compared with encoding alone."""
    sizes = sizes_of(context)
    cache = ActivationCache(write_synthetic_cache(context.folder / "synthetic", sizes.scanned, sizes.d_in))
    made = dictionary(sizes.d_in, sizes.d_sae, sizes.k).to(context.device)
    at_once = max(1, (1 << 26) // (sizes.d_sae * cache.context_length))

    @torch.no_grad()
    def encode() -> None:
        for batch in cache.contexts(TRAIN, HOOK, batch_contexts=at_once):
            assert batch.activations is not None
            made.encode_sparse(batch.activations[batch.eligible].to(context.device))

    def seconds(function: Callable[[], object]) -> float:
        synchronise(context.device)
        start = time.perf_counter()
        function()
        synchronise(context.device)
        return time.perf_counter() - start

    encode()
    passes, alone = [], []
    for _ in range(1 if context.dry else 3):
        passes.append(seconds(lambda: scan(made, cache, FeaturesConfig(), HOOK)))
        alone.append(seconds(encode))
    context.emit(
        "features",
        {
            "what": f"feature pass, {sizes.d_in:,} → {sizes.d_sae:,}, k {sizes.k}, {sizes.scanned:,} tokens",
            "tokens_per_second": sizes.scanned / statistics.median(passes),
            "beside": "reading and encoding",
            "beside_tokens_per_second": sizes.scanned / statistics.median(alone),
        },
    )


def evaluation(context: Context) -> None:
    """An evaluation by default settings, without and with losses of the model; tokens are those held out."""
    sizes = sizes_of(context)
    language_model = loaded(context, "float32")
    config = model_config(context, context.folder / "run")
    cache = harvest_activations(config, language_model)
    hook = config.harvest.hooks[0]
    made = {"it": dictionary(cache.d_in(hook), sizes.d_sae, sizes.k).to(context.device)}
    for what, model in (("reconstruction, sparsity and baselines", None), ("the same and losses", language_model)):
        start = time.perf_counter()
        evaluate_all(
            made, cache, hook=hook, language_model=model, settings=EvaluationConfig(), device=context.device
        )  # fmt: skip
        synchronise(context.device)
        speed = sizes.held_out / (time.perf_counter() - start)
        shape = f"{cache.d_in(hook)} → {sizes.d_sae:,}, {sizes.held_out:,} held-out tokens"
        context.emit(what, {"what": f"{what}, {shape}", "tokens_per_second": speed})
