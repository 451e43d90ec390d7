from __future__ import annotations

from pathlib import Path

import pytest

from sae.features import Features
from tests.support.feature_case import Case, build_case


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return build_case(tmp_path / "activations")


@pytest.fixture
def features(case: Case, tmp_path: Path) -> Features:
    return case.collect(tmp_path / "features")
