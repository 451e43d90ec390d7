"""Times of operations on a GPU, by its own events, in turns and over several inputs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

LEAST = 2e-3
"""Seconds of one sample at least: shorter operations are repeated in it, so that launches do not count."""


def medians(
    functions: Mapping[str, Callable[[Any], object]], inputs: Sequence[Any], device: str, samples: int
) -> dict[str, float]:
    """Median seconds of each function of one input, all in turns, each after two calls to warm up."""
    at_once = {}
    for name, function in functions.items():
        for x in inputs[:2]:
            function(x)
        at_once[name] = max(1, round(LEAST / max(sample(function, inputs, device, 1), 1e-6)))
    found: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(samples):
        turned = [*inputs[turn % len(inputs) :], *inputs[: turn % len(inputs)]]
        for name, function in functions.items():
            found[name].append(sample(function, turned, device, at_once[name]))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def sample(function: Callable[[Any], object], inputs: Sequence[Any], device: str, count: int) -> float:
    """Seconds per call of some calls, one after the other."""
    if device == "cpu":
        start = time.perf_counter()
        for number in range(count):
            function(inputs[number % len(inputs)])
        return (time.perf_counter() - start) / count
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for number in range(count):
        function(inputs[number % len(inputs)])
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / count
