"""The two parts of a text: what is trained on, and what is held out for evaluation."""

from __future__ import annotations

TRAIN, HELD_OUT = "train", "held_out"
SPLITS: tuple[str, ...] = (TRAIN, HELD_OUT)
