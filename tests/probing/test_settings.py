"""Settings of probes, read from words of a command line."""

from __future__ import annotations

import re

import pytest
import yaml

from sae.errors import ConfigError
from sae.probing.settings import (
    ConceptConfig,
    LetterConfig,
    ProbeConfig,
    describe_concept_keys,
    describe_keys,
    read_concept_overrides,
    read_overrides,
)


def test_settings_from_words() -> None:
    found = read_overrides(["k=[16, 2]", "pool=mean", "letters.words=50", "model.name=a.gguf", "device=cpu"])
    assert found.probes == ProbeConfig(k=(2, 16), pool="mean")
    assert found.letters == LetterConfig(words=50)
    assert found.of_run == ("model.name=a.gguf", "device=cpu")
    assert read_overrides(["k=4"]).probes.k == (4,)
    for word, message in (
        ("splits", "override 'splits': expected key=value, such as examples=200"),
        ("letters.word=3", "unknown setting 'letters.word': did you mean letters.words?"),
        ("splits=0", "setting splits=0: input should be greater than 0"),
        ("seed=9223372036854775808", "setting seed=9223372036854775808: expected at most 9,223,372,036,854,775,807"),
        ("k=[a", "override 'k=[a': '[a' is not a YAML value"),
        ("test_fraction=0.9", "test_fraction=0.9 and validation_fraction=0.15 leave nothing to train on: lower one"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            read_overrides([word])
    assert read_overrides(["letters.prompt="]).letters.prompt == ""
    assert yaml.safe_load({key: default for key, default, _ in describe_keys()}["k"]) == [1, 2, 5, 16]


def test_settings_of_a_search_from_words() -> None:
    settings, of_run = read_concept_overrides(["permutations=99", "positive=2", "pool=last", "device=cpu"])
    assert settings == ConceptConfig(permutations=99, positive="2", pool="last")
    assert of_run == ("device=cpu",)
    examples = settings.of_examples()
    assert (examples.pool, examples.examples, examples.seed) == ("last", 400, 0)
    for word, message in (
        ("permutation=9", "unknown setting 'permutation': did you mean permutations?"),
        ("permutations=9", "setting permutations=9: input should be greater than or equal to 19"),
        ("k=3", "unknown setting 'k': 'sae find --help' lists every key"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            read_concept_overrides([word])
    assert {key for key, *_ in describe_concept_keys()} == set(ConceptConfig.model_fields)
