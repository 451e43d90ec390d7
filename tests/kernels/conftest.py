"""Triton's kernels run in its interpreter, which has to be asked for before anything imports triton."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def _of_two_cases(case: dict[str, Any]) -> bool:
    return case["case"] in ("groups of columns", "odd sizes")


_QUICK: dict[str, Callable[[dict[str, Any]], bool]] = {
    "test_the_k_largest_of_each_row": _of_two_cases,
    "test_the_largest_of_the_batch": _of_two_cases,
    "test_all_above_their_feature_s_threshold": lambda case: case["level"] == 1.5 and _of_two_cases(case),
    "test_a_second_selection_in_a_subset": lambda case: case["k"] == 3 and case["batched"],
    "test_not_a_number_is_selected_first": lambda case: case["rows"] == 5,
    "test_adam_takes_the_reference_s_steps": lambda case: (
        case["parts"] in ("nothing", "all") and case["unit_rows"] and case["scale"] is not None
    ),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In the interpreter a case takes seconds: of Triton's some are run every day, the others are slow tests."""
    for item in items:
        if not isinstance(item, pytest.Function) or item.originalname not in _QUICK or "triton" not in item.name:
            continue
        if not _QUICK[item.originalname](item.callspec.params):
            item.add_marker(pytest.mark.slow)
