"""The two splits of a text: one for training, and one held out for evaluation."""

from __future__ import annotations

TRAIN, HELD_OUT = "train", "held_out"
SPLITS: tuple[str, ...] = (TRAIN, HELD_OUT)
