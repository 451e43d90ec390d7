"""Trains the embedded demo language model on the standard library, and writes its model card.

    python scripts/train_demo_model.py --out sae/demo

Resumable: run it again after an interruption. `--evaluate-only` measures the model that is already there.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sae.text.corpus import Document, is_held_out, standard_library

END_OF_TEXT = "<|endoftext|>"
VOCABULARY, CONTEXT, WIDTH, LAYERS, HEADS = 4096, 256, 256, 4, 4
HOLDOUT_SEED, HOLDOUT_FRACTION = 0, 0.1
BATCH = 32


def documents() -> tuple[list[Document], list[Document]]:
    """Training and held-out documents, split by name as `data.holdout_seed: 0` splits them."""
    train, held_out = [], []
    for document in standard_library():
        (held_out if is_held_out(document.name, HOLDOUT_SEED, HOLDOUT_FRACTION) else train).append(document)
    return train, held_out


def train_tokenizer(train: list[Document]) -> Tokenizer:
    """Byte-level BPE, as GPT-2's, with one special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in train), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[Document]) -> np.ndarray:
    """All documents as one token stream, an end-of-text token (id 0) behind each."""
    encodings = tokenizer.encode_batch([document.text for document in texts])
    stream = [np.array([*encoding.ids, 0], dtype=np.int64) for encoding in encodings]
    return np.concatenate(stream)


def contexts(stream: np.ndarray, rng: np.random.Generator | None) -> Tensor:
    """Contexts that open with end-of-text, as the harvest makes them; cut at a random offset when `rng` is given."""
    start = int(rng.integers(0, CONTEXT - 1)) if rng else 0
    count = (len(stream) - start) // (CONTEXT - 1)
    body = stream[start : start + count * (CONTEXT - 1)].reshape(count, CONTEXT - 1)
    if rng:
        body = body[rng.permutation(count)]
    return torch.from_numpy(np.concatenate([np.zeros((count, 1), dtype=np.int64), body], axis=1))


def batches(stream: np.ndarray, steps: int, first: int) -> Iterator[Tensor]:
    """`steps` batches, epoch after epoch, starting again at number `first`."""
    number, epoch = 0, 0
    while True:
        for batch in contexts(stream, np.random.default_rng(epoch)).split(BATCH):
            if len(batch) < BATCH:
                continue
            if number == steps:
                return
            if number >= first:
                yield batch
            number += 1
        epoch += 1


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over 2 % of the steps, then linear decay to nothing over the last 60 %."""
    return min(1.0, (step + 1) / (0.02 * steps), max((steps - step) / (0.6 * steps), 0.0))


def loss_of(model: GPT2LMHeadModel, batch: Tensor) -> Tensor:
    logits = model(batch).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def train_model(stream: np.ndarray, steps: int, checkpoint: Path) -> GPT2LMHeadModel:
    """Muon on the hidden matrices, AdamW on embeddings, biases and norms; bfloat16 products."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, use_cache=False,
        )
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.nn.Module.to(model, device)
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    rest = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".h." in name)]
    optimizers = [
        torch.optim.Muon(hidden, lr=0.02, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first = state["step"]
        print(f"resumed at step {first:,}")
    started, smooth = time.time(), 0.0
    for step, batch in enumerate(batches(stream, steps, first), first):
        for optimizer, rates in zip(optimizers, base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(step, steps)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = loss_of(model, batch.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        smooth = loss.item() if step == first else 0.98 * smooth + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            speed = (step + 1 - first) * BATCH * CONTEXT / (time.time() - started)
            print(f"step {step + 1:,}/{steps:,}  loss {smooth:.3f}  {speed:,.0f} tokens/s", flush=True)
        if (step + 1) % 200 == 0:
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    return model.cpu()


@torch.no_grad()
def held_out_nats(model: GPT2LMHeadModel, stream: np.ndarray) -> float:
    """Mean next-token loss over the held-out stream, in contexts as in training."""
    model.eval()
    total = count = 0
    for batch in contexts(stream, None).split(BATCH):
        total += float(loss_of(model, batch)) * batch[:, 1:].numel()
        count += batch[:, 1:].numel()
    return total / count


def count_baselines(train: np.ndarray, held_out: np.ndarray) -> tuple[float, float]:
    """Held-out loss in nats of the unigram model, and of the bigram model interpolated with it (λ fitted on a grid)."""
    unigram = np.bincount(train, minlength=VOCABULARY) + 1.0
    unigram /= unigram.sum()
    bigram = np.zeros((VOCABULARY, VOCABULARY), dtype=np.float32)
    np.add.at(bigram, (train[:-1], train[1:]), 1.0)
    bigram /= np.maximum(bigram.sum(axis=1, keepdims=True), 1.0)
    previous, following = held_out[:-1], held_out[1:]
    pairs = bigram[previous, following]
    best = min(
        float(-np.log(weight * pairs + (1 - weight) * unigram[following]).mean())
        for weight in np.linspace(0.5, 0.95, 10)
    )
    return float(-np.log(unigram[held_out]).mean()), best


CARD = """# demo

A small language model of GPT-2's architecture, shipped with the package so that every command works on a machine with
no network. It was trained by `scripts/train_demo_model.py` on the Python standard library's source and on the topics of
`help()`; the same command trains it again.

| | |
|---|---|
| parameters | {parameters:,} |
| shape | {layers} layers, d_model {width}, {heads} heads, contexts of {context} tokens that open with `{end}` |
| tokenizer | byte-level BPE, {vocabulary:,} tokens |
| training text | {train_documents:,} documents, {train_tokens:,} tokens, seen {epochs:.1f} times ({python}) |
| held-out text | {held_out_documents:,} documents, {held_out_tokens:,} tokens, chosen by a hash of the file name (`data.holdout_seed: 0`) |
| optimiser | Muon on hidden matrices, AdamW on the rest, bfloat16 products, {steps:,} steps of {batch_tokens:,} tokens |

Held-out loss:

| model | nats per token | bits per byte |
|---|---|---|
{losses}

Weights are stored in float16 and the table is measured on them as stored.

Meant for trying the toolkit and for tests; not for use as a language model.
"""  # noqa: E501


def write_card(out: Path, steps: int) -> None:
    """Measures the saved model and its baselines, and writes README.md and metrics.json beside it."""
    train, held_out = documents()
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    train_stream, stream = encode(tokenizer, train), encode(tokenizer, held_out)
    model = GPT2LMHeadModel.from_pretrained(out, dtype=torch.float32)
    unigram, bigram = count_baselines(train_stream, stream)
    held_out_bytes = sum(len(str(document.text).encode()) for document in held_out)
    per_byte = (len(stream) - len(held_out)) / held_out_bytes / math.log(2)
    nats = {"demo": held_out_nats(model, stream), "bigram, interpolated": bigram, "unigram": unigram}
    losses = "\n".join(f"| {name} | {value:.3f} | {value * per_byte:.3f} |" for name, value in nats.items())
    card = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()), layers=LAYERS, width=WIDTH, heads=HEADS,
        context=CONTEXT, end=END_OF_TEXT, vocabulary=VOCABULARY, train_documents=len(train),
        train_tokens=len(train_stream), epochs=steps * BATCH * (CONTEXT - 1) / len(train_stream),
        python=f"CPython {platform.python_version()}", held_out_documents=len(held_out), held_out_tokens=len(stream),
        steps=steps, batch_tokens=BATCH * CONTEXT, losses=losses,
    )  # fmt: skip
    (out / "README.md").write_text(card, encoding="utf-8")
    (out / "metrics.json").write_text(json.dumps({"held_out_nats_per_token": nats, "steps": steps}, indent=2) + "\n")
    print(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("sae/demo"), help="folder to write")
    parser.add_argument("--checkpoint", type=Path, default=Path("demo-training.pt"), help="where training resumes from")
    parser.add_argument("--steps", type=int, default=3000, help="optimiser steps of 8,192 tokens")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the model in --out and rewrite its card")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.evaluate_only:
        train, _ = documents()
        tokenizer = train_tokenizer(train)
        stream = encode(tokenizer, train)
        print(f"{len(train):,} documents, {len(stream):,} tokens", flush=True)
        model = train_model(stream, arguments.steps, arguments.checkpoint)
        model.half().save_pretrained(arguments.out)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, model_max_length=CONTEXT
        ).save_pretrained(arguments.out)
    write_card(arguments.out, arguments.steps)


if __name__ == "__main__":
    main()
