"""What the conformance checks need, made in this package's own environment: `python conformance_prepare.py FOLDER`.

One dictionary of every architecture, with its evaluation, and the evaluation's tokens and the language model under
names that other tools find without a network. Does nothing where it is all there.

    FOLDER/sweep/ARCHITECTURE/     dictionary/, eval.json
    FOLDER/gpt2/                   the embedded demo model: transformer-lens 3 only takes names it knows
    FOLDER/tokens/                 the held-out contexts, as a data set of token ids
    FOLDER/roneneldan/TinyStories/ the same as text, under the name that SAEBench's tests ask for
    FOLDER/hub/                    what SAELens looks up on the hub: which tokenizer made `tokens`
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import get_args

import sae
from sae.config.settings import Architecture
from sae.config.splits import HELD_OUT
from sae.dictionary.model_identity import DEMO_FOLDER

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
CONTEXTS, LENGTH = 64, 128
SETTINGS = [
    "data.tokens=200000", f"data.held_out_tokens={CONTEXTS * LENGTH}", f"data.context_length={LENGTH}",
    "harvest.dtype=float32", "dictionary.d_sae=1024", "train.tokens=200000", "train.dead_after_tokens=50000",
    "evaluation.frozen_decoder_tokens=0", f"evaluation.downstream_tokens={CONTEXTS * LENGTH}",
    f"evaluation.legacy_tokens={CONTEXTS * LENGTH}",
    f"sweep.dictionary.architecture=[{', '.join(get_args(Architecture))}]",
]  # fmt: skip
COMMIT = "0" * 40


def main(folder: Path) -> None:
    sweep = sae.sweep(sae.load_config(CONFIG, [f"out={folder / 'sweep'}", *SETTINGS]))
    if sweep.failures:
        raise SystemExit(f"training failed: {sweep.failures}")
    write_model(folder / "gpt2")
    write_texts(folder, sae.ActivationCache(folder / "sweep"))


def write_model(folder: Path) -> None:
    """The demo model's folder, with the one key of GPT-2's own configuration that transformer-lens 3 reads beside."""
    shutil.copytree(DEMO_FOLDER, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "n_ctx": config["n_positions"]}))


def write_texts(folder: Path, cache: sae.ActivationCache) -> None:
    """The held-out contexts as token ids and as text, and the note that SAELens compares tokenizers by."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "gpt2")
    contexts = [tokens for batch in cache.contexts(HELD_OUT) for tokens in batch.tokens.tolist()]
    assert len(contexts) == CONTEXTS and {len(tokens) for tokens in contexts} == {LENGTH}
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in contexts]
    write_lines(folder / "tokens", [{"tokens": tokens} for tokens in contexts])
    write_lines(folder / "roneneldan" / "TinyStories", [{"text": text} for text in texts])
    note = folder / "hub" / "hub" / "datasets--tokens"
    settings = note / "snapshots" / COMMIT / "sae_lens.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps({"tokenizer_name": "gpt2"}))
    (note / "refs").mkdir(exist_ok=True)
    (note / "refs" / "main").write_text(COMMIT, encoding="utf-8")


def write_lines(folder: Path, rows: list[dict[str, object]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
