"""Every random stream is drawn by purpose: none is what a small number seeds, and no two purposes share one."""

from __future__ import annotations

import ast
import functools
import itertools
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import sae
from sae.numerics.seeding import number, numpy_generator, python_random, torch_generator

ROOT = Path(sae.__file__).parent
MAKERS = ("torch_generator", "numpy_generator", "python_random", "random_keys")
SMALL = 1 << 16
DRAWS, BITS = 4, 20


def of_torch(generator: torch.Generator) -> tuple[int, ...]:
    """The low bits of the first words of a Mersenne Twister."""
    return tuple(torch.randint(0, 1 << BITS, (DRAWS,), generator=generator).tolist())


def of_python(generator: random.Random) -> tuple[int, ...]:
    return tuple(generator.getrandbits(32) % (1 << BITS) for _ in range(DRAWS))


def of_twister(words: np.ndarray) -> tuple[int, ...]:
    return tuple((words[:DRAWS] % (1 << BITS)).tolist())


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """Dotted names of everything that is called; of a method of an expression `.name`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            parts, at = [], node.func
            while isinstance(at, ast.Attribute):
                parts, at = [at.attr, *parts], at.value
            found.append((".".join([at.id if isinstance(at, ast.Name) else "", *parts]), node))
    return found


@functools.cache
def purposes() -> list[str]:
    """The first argument of every call of a maker in the package, as it stands in the source."""
    found = []
    for path in ROOT.rglob("*.py"):
        for name, call in calls(ast.parse(path.read_text())):
            if name.split(".")[-1] in MAKERS and path.name != "seeding.py":
                argument = call.args[1 if name == "random_keys" else 0]
                found.append(argument.value if isinstance(argument, ast.Constant) else ast.unparse(argument))
    return found


def test_torchs_generator_is_a_mersenne_twister_with_the_hashed_words() -> None:
    generator = torch_generator("some purpose", 3)
    words = generator.get_state()[24 : 24 + 8 * 624].view(torch.int64).numpy()
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": words.astype(np.uint32), "pos": 624}}
    drawn = torch.randint(0, 1 << BITS, (2000,), generator=generator)
    assert drawn.tolist() == (twister.random_raw(2000) % (1 << BITS)).tolist()
    assert len(set(words.tolist())) > 620
    assert 0 <= int(words.min()) < int(words.max()) < 1 << 32
    sample = torch.randn(50_000, generator=torch_generator("some purpose", 3))
    assert abs(float(sample.mean())) < 0.02
    assert abs(float(sample.var()) - 1) < 0.03
    assert torch_generator("some purpose", 3).initial_seed() != torch_generator("some purpose", 4).initial_seed()


def test_no_stream_is_what_a_small_number_seeds() -> None:
    legacy, twister = random.Random(), np.random.MT19937()
    twisters = set()
    for n in range(SMALL):
        twister._legacy_seeding(n)  # what np.random.seed and torch.manual_seed do
        twisters.add(of_twister(twister.random_raw(DRAWS)))
        legacy.seed(n)
        twisters.add(of_python(legacy))
    assert all(of_torch(torch.Generator().manual_seed(n)) in twisters for n in range(0, SMALL, 255))
    others = {int(np.random.PCG64(n).random_raw()) for n in range(SMALL)}
    assert of_twister(np.random.RandomState(7)._bit_generator.random_raw(DRAWS)) in twisters
    assert int(np.random.default_rng(7).bit_generator.random_raw()) in others
    drawn = set(purposes())
    assert len(drawn) >= 20
    for purpose, seed in itertools.product(drawn, (0, 1, 5, 65_535, -1)):
        assert of_torch(torch_generator(purpose, seed)) not in twisters
        assert of_python(python_random(purpose, seed)) not in twisters
        assert int(numpy_generator(purpose, seed).bit_generator.random_raw()) not in others


def test_purposes_and_numbers_that_differ_in_anything_share_no_stream() -> None:
    numbers = [(), (0,), (5,), (5, 0), (5, 0, 0), (0, 5), (-5,), (-1,), (50,), (5 + (1 << 32),), (5 + (1 << 64),),
               (5 << 32,), (1, 23), (12, 3)]  # fmt: skip
    names = ["", "a", "b", "a 5", 'a", 5', "a\\", *sorted(set(purposes()))]
    keys = list(itertools.product(names, numbers))
    for draw in (
        lambda purpose, numbers: of_torch(torch_generator(purpose, *numbers)),
        lambda purpose, numbers: of_python(python_random(purpose, *numbers)),
        lambda purpose, numbers: int(numpy_generator(purpose, *numbers).bit_generator.random_raw()),
        lambda purpose, numbers: number(purpose, *numbers),
    ):
        assert len({draw(*key) for key in keys}) == len(keys)
        assert [draw(*key) for key in keys[:20]] == [draw(*key) for key in keys[:20]], "the same again"


def test_every_purpose_stands_in_one_place() -> None:
    assert [purpose for purpose, count in Counter(purposes()).items() if count > 1] == []


GENERATORS = set(
    "manual_seed manual_seed_all default_rng RandomState SeedSequence Generator seed Random SystemRandom PCG64 "
    "PCG64DXSM Philox MT19937 SFC64 fork_rng set_rng_state".split()
)
DRAWN = set(
    "rand randn randint randperm normal bernoulli multinomial poisson binomial rand_like randn_like randint_like "
    "normal_ uniform_ random_ bernoulli_ exponential_ cauchy_ geometric_ log_normal_ "
    "kaiming_normal_ kaiming_uniform_ xavier_normal_ xavier_uniform_ trunc_normal_ orthogonal_ sparse_".split()
)
RANDOM_BY_THEMSELVES = {"Linear", "Embedding", "Dropout", "dropout"}
MODULES = ("random.", "np.random.", "numpy.random.")


def streams_of_their_own(source: str) -> list[str]:
    """Calls in a module that make a generator, or draw from one that is everybody's."""
    tree = ast.parse(source)
    found = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in ("random", "numpy.random", "torch.random", "secrets")
    ]
    for name, call in calls(tree):
        last, keywords = name.split(".")[-1], {keyword.arg for keyword in call.keywords}
        makes = last in GENERATORS or name.startswith(MODULES) or last in RANDOM_BY_THEMSELVES
        if makes or (last in DRAWN and "generator" not in keywords) or "random_state" in keywords:
            found.append(ast.unparse(call))
    return found


@pytest.mark.parametrize(
    "source",
    [
        "torch.manual_seed(0)",
        "torch.Generator().manual_seed(seed)",
        "torch.cuda.manual_seed_all(1)",
        "rng = np.random.default_rng([seed, 1])",
        "np.random.seed(0)",
        "np.random.permutation(5)",
        "numpy.random.normal()",
        "random.seed(0)",
        "random.Random(0)",
        "random.shuffle(items)",
        "from random import Random",
        "from numpy.random import default_rng",
        "torch.randn(3, 4)",
        "torch.rand_like(x)",
        "torch.randperm(n)[:5]",
        "x.normal_()",
        "nn.init.kaiming_uniform_(W)",
        "torch.nn.Linear(3, 4)",
        "LogisticRegression(random_state=0)",
    ],
)
def test_the_walk_of_the_source_finds(source: str) -> None:
    assert streams_of_their_own(source)
    assert not streams_of_their_own(
        "x = torch.randn(3, generator=torch_generator('a', seed))\ny = numpy_generator('b', 1).permutation(3)\n"
        "def draw(rng: np.random.Generator) -> int: return rng.integers(3)"
    )


def test_no_module_has_a_stream_of_its_own() -> None:
    found = {
        str(path.relative_to(ROOT)): calls
        for path in sorted(ROOT.rglob("*.py"))
        if path.name != "seeding.py" and (calls := streams_of_their_own(path.read_text()))
    }
    assert found == {}
