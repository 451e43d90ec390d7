from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sae.results.estimate import DocumentSums, Estimate, ratio, student_t
from tests.support import evaluation_reference as reference


def _tokens(documents: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numerators and denominators that agree within a document, in documents of 1 to 40 tokens."""
    rng = np.random.default_rng(seed)
    origin = np.repeat(np.arange(documents), rng.integers(1, 41, documents))
    b = rng.gamma(4, size=documents)[origin] + rng.random(len(origin))
    a = 0.4 * b + rng.normal(1, 0.5, documents)[origin] + rng.normal(size=len(origin))
    return a, b, origin


def _ratio(a: np.ndarray, b: np.ndarray, origin: np.ndarray) -> Estimate:
    sums = DocumentSums(int(origin.max()) + 5, ("a", "b"))
    order = np.random.default_rng(1).permutation(len(a))
    for part in np.array_split(order, 7):
        values = {"a": torch.from_numpy(a[part]), "b": torch.from_numpy(b[part])}
        sums.add_(torch.from_numpy(origin[part]), values)
    return ratio(sums["a"], sums["b"])


def test_ratio_equals_a_loop_over_documents() -> None:
    a, b, origin = _tokens()
    value, error = reference.ratio(a, b, origin)
    estimate = _ratio(a, b, origin)
    assert estimate.value == pytest.approx(value, rel=1e-12)
    assert estimate.standard_error == pytest.approx(error, rel=1e-12)


def test_standard_error_is_the_bootstrap_over_documents_and_not_over_tokens() -> None:
    a, b, origin = _tokens(documents=150)
    error = _ratio(a, b, origin).standard_error
    assert error == pytest.approx(reference.bootstrap(a, b, origin), rel=0.1)
    as_if_independent = reference.bootstrap(a, b, np.arange(len(a)), 1000)
    assert error is not None and error > 2 * as_if_independent


def test_one_token_per_document_is_the_textbook_standard_error_of_a_mean() -> None:
    a = np.array([1.0, 2.0, 4.0, 9.0])
    estimate = _ratio(a, np.ones(4), np.arange(4))
    assert estimate.value == 4.0
    assert estimate.standard_error == pytest.approx(a.std(ddof=1) / 2, rel=1e-15)


def test_undefined_is_none_never_nan() -> None:
    assert _ratio(np.ones(3), np.ones(3), np.zeros(3, dtype=int)) == Estimate(1.0, None)
    assert _ratio(np.ones(3), np.zeros(3), np.arange(3)) == Estimate(None, None)


def test_documents_without_tokens_are_no_sample() -> None:
    sums = DocumentSums(9, ("a",))
    sums.add_(torch.tensor([2, 2, 7]), {"a": torch.tensor([1.0, 3.0, 5.0])})
    assert (sums.tokens, sums.documents) == (3, 2)
    assert sums["a"].tolist() == [4.0, 5.0]
    # The mean is 3, and 5 or 2 with one of the two documents left out.
    assert sums.mean("a").standard_error == pytest.approx(math.sqrt(0.5 * (2.0**2 + 1.0**2)))


def test_degrees_of_freedom_count_documents_as_far_as_they_are_of_one_length() -> None:
    def degrees(lengths: list[int]) -> float | None:
        b = torch.tensor(lengths).double()
        return ratio(b * torch.arange(len(lengths)), b).degrees_of_freedom

    assert degrees([7] * 12) == pytest.approx(11), "n − 1"
    assert degrees([100, 100, 100, *[1] * 50]) == pytest.approx(3.01, abs=1e-3), "as good as three documents"
    assert degrees([1000, 1]) == 1.0


def test_a_document_that_is_all_there_is_has_no_standard_error() -> None:
    assert ratio(torch.tensor([3.0, 0.0]).double(), torch.tensor([2.0, 0.0]).double()) == Estimate(1.5, None)


@pytest.mark.parametrize(
    ("degrees", "quantile", "tolerance"),
    [
        (1.0, 12.706205, 0.12),
        (2.0, 4.302653, 0.01),
        (4.0, 2.776445, 1e-3),
        (10.0, 2.228139, 1e-5),
        (60.0, 2.000298, 1e-6),
    ],
)
def test_student_t_is_that_of_the_tables(degrees: float, quantile: float, tolerance: float) -> None:
    assert student_t(degrees) == pytest.approx(quantile, rel=tolerance)
    assert student_t(None) == pytest.approx(1.959964, rel=1e-7)


def test_the_interval_is_student_s_and_survives_json() -> None:
    made = Estimate(2.0, 0.1, 10.0)
    assert made.interval == pytest.approx((2 - 0.2228139, 2 + 0.2228139), rel=1e-5)
    again = Estimate.from_json(made.to_json())
    assert again == made and again.interval == made.interval
    assert Estimate(2.0, None).interval is None


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0.123456, 0.00123), "0.1235 ± 0.0012"),
        (Estimate(12345.6, 34.2), "12,346 ± 34"),
        (Estimate(0.25, None), "0.25 ± –"),
        (Estimate(None, None), "–"),
        (Estimate(32.0, 0.0), "32 ± 0"),
        (Estimate(0.25, 1e-17), "0.25 ± 0"),
        (Estimate(1.6789e-5, 2.1e-7), "1.679e-05 ± 2.1e-07"),
        (Estimate(0.0, 2.1e-8), "0.0e+00 ± 2.1e-08"),
    ],
)
def test_text_has_two_digits_of_the_standard_error(estimate: Estimate, text: str) -> None:
    assert str(estimate) == text


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0.123456, 0.00123), "0.1235"),
        (Estimate(12345.6, 34.2), "12,346"),
        (Estimate(-123.45678, 0.00123), "-123"),
        (Estimate(1234567.8, 12.0), "1.2e+06"),
        (Estimate(None, None), "–"),
    ],
)
def test_short_text_has_seven_characters_at_most(estimate: Estimate, text: str) -> None:
    assert estimate.short() == text
