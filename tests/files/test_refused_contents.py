"""Contents that are refused although nothing says that the file was damaged: contradictions, no numbers, bombs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import sae
from sae.architectures import TopK
from sae.config.file import load_config
from sae.errors import ConfigError, DamagedError
from sae.files.damage import SUMS
from sae.files.reading import read_json
from sae.files.writing import write_bytes


@pytest.mark.filterwarnings("ignore::sae.files.hashes.UnhashedWarning")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 3}, "k=3, but 2 in its own metadata"),
        ({"architecture": "batch_topk"}, "architecture='batch_topk', but 'topk' in its own metadata"),
        ({"d_in": 5}, r"W_dec \[8, 4\], expected \[8, 5\]"),
        ({"d_sae": 10**12}, r"W_dec \[8, 4\], expected \[1000000000000, 4\]"),
        ({"d_sae": "8"}, "d_sae='8': expected a whole number"),
        ({"dtype": "bfloat16"}, "is float32, but config.json says 'bfloat16'"),
        ({"metadata": []}, "metadata should be keys and values"),
        ({"metadata": {"tokens": {"prepend_bos": 1}}}, r"config.json': damaged \(no 'masked_positions'\)"),
    ],
)
def test_a_configuration_that_contradicts_itself_or_the_weights_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    trained = {"trained": {"settings": {"architecture": "topk", "k": 2, "d_sae": 8, "d_in": 4}}}
    TopK(4, 8, k=2, metadata=trained).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_bytes())
    (tmp_path / SUMS).unlink()
    sae.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    with pytest.raises(DamagedError, match=message):
        sae.load(tmp_path)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    dictionary = TopK(4, 8, k=2)
    with torch.no_grad():
        dictionary.W_enc[1, 2] = float("inf")
    dictionary.save(tmp_path)
    with pytest.raises(DamagedError, match=r"W_enc has values that are not finite \(NaN or infinity\)"):
        sae.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number of 5000 digits"),
        (b'{"a": 1, "a": 2}', "key 'a' is repeated"),
        (b'{"a": "\xff"}', "can't decode byte 0xff"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
    ],
)
def test_json_that_the_toolkit_does_not_write_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    write_bytes(tmp_path / "a.json", content)
    with pytest.raises(DamagedError, match=message):
        read_json(tmp_path / "a.json")


BOMB = b"a: &a [x,x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (n, n, b",".join([b"*%c" % (n - 1)] * 10)) for n in range(ord("b"), ord("j"))
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB, "more than 10,000 values, aliases counted"),
        (b"sweep: &a [*a]", "not YAML|too deep"),
        (b"seed: " + b"9" * 5000, "not YAML"),
        (b"[" * 5000, "not YAML .too deep"),
        (b"seed: 2024-99-99", "not YAML"),
        (b"out: \xff", "cannot be read"),
        (b"#" * 2_000_000, "at most 1,048,576 are read"),
        (b"features: {quantiles: 1000000000}", "examples per feature; at most 10,000"),
    ],
)
def test_settings_that_would_take_all_memory_or_cannot_be_read(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(tmp_path / "c.yaml")
    assert len(str(caught.value)) < 600
