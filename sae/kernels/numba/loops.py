"""The loops that Numba compiles. They are in one file because a change of it makes Numba compile them all anew."""

from __future__ import annotations

import numpy as np

from sae.kernels.numba.compiled import compiled


@compiled
def add_scaled(total, factor, row):
    """total += factor · row"""
    for j in range(len(total)):
        total[j] += factor * row[j]


@compiled
def add(total, row):
    """total += row"""
    for j in range(len(total)):
        total[j] += row[j]


@compiled
def dot(left, right):
    total = left.dtype.type(0)
    for j in range(len(left)):
        total += left[j] * right[j]
    return total


@compiled
def decode(start, stop, features, offsets, values, decoder, out):
    for row in range(start, stop):
        for pair in range(offsets[row], offsets[row + 1]):
            add_scaled(out[row], values[pair], decoder[features[pair]])


@compiled
def sample(start, stop, features, offsets, gradient, decoder, out):
    for row in range(start, stop):
        for pair in range(offsets[row], offsets[row + 1]):
            out[pair] = dot(gradient[row], decoder[features[pair]])


@compiled
def residual(start, stop, features, offsets, values, decoder, bias, target, left, products):
    for row in range(start, stop):
        for j in range(len(bias)):
            left[row, j] = target[row, j] - bias[j]
        for pair in range(offsets[row], offsets[row + 1]):
            add_scaled(left[row], -values[pair], decoder[features[pair]])
        for pair in range(offsets[row], offsets[row + 1]):
            products[pair] = dot(left[row], decoder[features[pair]])


@compiled
def adam(
    start, stop, offsets, rows, coefficients, matrix, places, block, weights, firsts, seconds, bits, numbers, unit_rows
):
    for feature in range(start, stop):
        change = np.zeros_like(weights[feature])
        for pair in range(offsets[feature], offsets[feature + 1]):
            add_scaled(change, coefficients[pair], matrix[rows[pair]])
        if places[feature] >= 0:
            add(change, block[places[feature]])
        if unit_rows:
            add_scaled(change, -dot(change, weights[feature]), weights[feature])
        step(weights[feature], firsts[feature], seconds[feature], change, numbers)
        if unit_rows:
            normalise(weights[feature])
        if len(bits):
            round_to_bfloat16(weights[feature], bits[feature])


@compiled
def step(weight, first, second, change, numbers):
    rate1, beta2, rate2, eps, lr, root, scale = numbers
    for j in range(len(weight)):
        gradient = change[j] * scale
        first[j] += rate1 * (gradient - first[j])
        second[j] = beta2 * second[j] + rate2 * gradient * gradient
        weight[j] -= lr * first[j] / (np.sqrt(second[j]) / root + eps)


@compiled
def normalise(weight):
    norm = max(np.sqrt(dot(weight, weight)), np.finfo(weight.dtype).tiny)
    for j in range(len(weight)):
        weight[j] /= norm


@compiled
def round_to_bfloat16(weight, bits):
    """The upper halves of float32 numbers, rounded to nearest, ties to even; NaNs stay NaNs."""
    numbers = weight.astype(np.float32).view(np.uint32)
    for j in range(len(weight)):
        number = numbers[j]
        rounded = (number + np.uint32(0x7FFF) + ((number >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        bits[j] = np.int16(rounded if number & np.uint32(0x7FFFFFFF) <= np.uint32(0x7F800000) else np.uint32(0x7FC0))


@compiled
def before(a, b):
    """Whether a is larger than b; NaNs are larger than all else."""
    return a > b or (a != a and b == b)  # noqa: PLR0124


@compiled
def cut_down(values, places, count, k):
    """Move the k largest of `count` entries to the front, and return the smallest of them (Hoare's quickselect)."""
    low, high = 0, count - 1
    while low < high:
        pivot = values[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while before(values[i], pivot):
                i += 1
            while before(pivot, values[j]):
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                places[i], places[j] = places[j], places[i]
                i += 1
                j -= 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            break
    return values[k - 1]


@compiled
def cut(values, places, counts, bounds, k):
    for group in range(len(values)):
        if counts[group] > k:
            bounds[group] = cut_down(values[group], places[group], counts[group], k)
            counts[group] = k


@compiled
def first_bound(line, k):
    """A number that at least k exceed: just below the k-th largest of the maxima of 2k groups. NaN if none is found."""
    groups = 2 * k
    bounds = np.array([np.nan, -np.inf], line.dtype)
    if len(line) >= 2 * groups:
        maxima = line[:groups].copy()
        for start in range(groups, len(line) - groups + 1, groups):
            for group in range(groups):
                if line[start + group] > maxima[group]:  # noqa: PLR1730 (compiled, max takes longer)
                    maxima[group] = line[start + group]
        least = cut_down(maxima, np.empty(groups, np.int64), groups, k)
        if least > bounds[1]:
            return np.nextafter(least, bounds[1])
    return bounds[0]


@compiled
def take_line(line, marks, words, place, values, places, group, count, bound, k):
    """Append the numbers of a line that exceed the group's bound; when there is no room, cut down.

    Args:
        line: the numbers.
        marks: a byte for each, and more zeros to a multiple of eight; overwritten.
        words: the same memory, eight marks in each.
        place: place of the first number.

    Returns:
        The new count and bound.
    """
    if count == 0:
        bound = first_bound(line, k)
    for j in range(len(line)):
        marks[j] = not line[j] <= bound
    for word in range(len(words)):
        if words[word]:
            for j in range(8 * word, min(8 * word + 8, len(line))):
                if not line[j] <= bound:
                    values[group, count] = line[j]
                    places[group, count] = place + j
                    count += 1
                    if count == values.shape[1]:
                        bound = cut_down(values[group], places[group], count, k)
                        count = k
    return count, bound


@compiled
def take(tile, offsets, first, width, values, places, counts, bounds, k):
    line, marks = np.empty_like(offsets), np.zeros((len(offsets) + 7) // 8 * 8, np.bool_)
    words = marks.view(np.uint64)
    for row in range(len(tile)):
        for j in range(len(line)):
            line[j] = tile[row, j] + offsets[j]
        group = 0 if width else row
        counts[group], bounds[group] = take_line(
            line, marks, words, first + row * width, values, places, group, counts[group], bounds[group], k
        )


@compiled
def take_bfloat16(tile, offsets, first, width, values, places, counts, bounds, k):
    line, marks = np.empty_like(offsets), np.zeros((len(offsets) + 7) // 8 * 8, np.bool_)
    words = marks.view(np.uint64)
    bits = line.view(np.int32)  # a bfloat16 is the upper half of a float32
    for row in range(len(tile)):
        for j in range(len(line)):
            bits[j] = np.int32(tile[row, j]) << 16
        for j in range(len(line)):
            line[j] += offsets[j]
        group = 0 if width else row
        counts[group], bounds[group] = take_line(
            line, marks, words, first + row * width, values, places, group, counts[group], bounds[group], k
        )
