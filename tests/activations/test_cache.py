from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from sae.activations import ActivationCache
from sae.activations.manifest import MANIFEST
from sae.config.splits import HELD_OUT, SPLITS, TRAIN
from sae.errors import CacheError
from sae.files.writing import write_json
from sae.runs.verification import verify

HOOK = "blocks.1.hook_resid_pre"
SHARD = f"{HOOK}/train-00002.safetensors"


@pytest.fixture
def copy(tiny_cache: ActivationCache, tmp_path: Path) -> Path:
    """The tiny cache, to be damaged."""
    return shutil.copytree(tiny_cache.path, tmp_path / "cache")


def test_what_a_cache_says_of_itself(tiny_cache: ActivationCache) -> None:
    assert tiny_cache.hooks == (HOOK, "blocks.2.hook_mlp_out")
    assert (tiny_cache.rows(), tiny_cache.rows(HELD_OUT)) == (1000, 200)
    assert (tiny_cache.shards(), tiny_cache.shards(HELD_OUT)) == (8, 2)  # shards of 8 · 16 rows
    assert tiny_cache.d_in(HOOK) == 32
    assert tiny_cache.context_length == 16
    assert "1,000 train, 200 held_out tokens" in repr(tiny_cache)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("batch_contexts", [1, 3, 8, 100])
def test_contexts_give_every_row_in_order(tiny_cache: ActivationCache, split: str, batch_contexts: int) -> None:
    batches = list(tiny_cache.contexts(split, HOOK, batch_contexts=batch_contexts))
    shards = [tiny_cache.token_shard(split, number) for number in range(tiny_cache.shards(split))]
    stored = [tiny_cache.activation_shard(HOOK, split, number)[0] for number in range(tiny_cache.shards(split))]
    assert torch.cat([b.tokens.flatten() for b in batches]).tolist() == torch.cat([t for t, _ in shards]).tolist()
    assert torch.cat([b.documents.flatten() for b in batches]).tolist() == torch.cat([d for _, d in shards]).tolist()
    assert torch.equal(torch.cat([b.activations.flatten(0, 1) for b in batches]), torch.cat(stored))
    row = 0
    for batch in batches:
        assert batch.first_row == row
        assert batch.tokens.shape[0] <= batch_contexts
        row += batch.tokens.numel()
    assert row == tiny_cache.rows(split)
    assert [batch.tokens.shape[1] for batch in batches[:-1]] == [16] * (len(batches) - 1)
    assert batches[-1].tokens.shape == (1, 8)  # both 1000 and 200 leave half a context of 16


def test_contexts_without_a_hook_have_no_activations(tiny_cache: ActivationCache) -> None:
    assert all(batch.activations is None for batch in tiny_cache.contexts())


@pytest.mark.parametrize("batch_contexts", [1, 3, 4, 5, 100])
def test_max_tokens_stops_before_the_context_that_would_exceed_it(
    tiny_cache: ActivationCache, batch_contexts: int
) -> None:
    """The held-out split has 12 whole contexts of 16 and one of 8."""
    lengths = [16] * 12 + [8]
    for max_tokens in (0, 1, 15, 16, 17, 100, 128, 135, 137, 183, 191, 192, 199, 200, 10**6):
        whole = max(n for n in range(14) if sum(lengths[:n]) <= max_tokens)
        batches = tiny_cache.contexts(HELD_OUT, batch_contexts=batch_contexts, max_tokens=max_tokens)
        rows = [batch.first_row + row for batch in batches for row in range(batch.tokens.numel())]
        assert rows == list(range(sum(lengths[:whole]))), max_tokens


def test_special_and_first_tokens_are_not_eligible(tiny_cache: ActivationCache, language_model) -> None:
    for split in SPLITS:
        for batch in tiny_cache.contexts(split):
            assert (batch.tokens[:, 0] == language_model.bos).all()
            expected = batch.tokens != language_model.bos
            assert torch.equal(batch.eligible, expected)
        rows = torch.cat([tiny_cache.eligible_shard(split, number) for number in range(tiny_cache.shards(split))])
        assert rows.tolist() == [
            bool(x) for batch in tiny_cache.contexts(split) for x in batch.eligible.flatten().tolist()
        ]


def test_documents_are_those_of_the_text(tiny_cache: ActivationCache, text_folder: Path, language_model) -> None:
    """The tokens of one document, without BOS and separator, spell its text."""
    names = tiny_cache.documents()
    tokens = torch.cat([batch.tokens.flatten() for batch in tiny_cache.contexts()])
    owners = torch.cat([batch.documents.flatten() for batch in tiny_cache.contexts()])
    assert owners.unique().tolist() == list(range(len(names)))
    for number in (0, 1, len(names) - 2):
        ids = tokens[(owners == number) & (tokens != language_model.bos)]
        assert language_model.tokenizer.decode(ids.tolist()) == (text_folder / names[number]).read_text(
            encoding="utf-8"
        )
    assert not set(names) & set(tiny_cache.documents(HELD_OUT))


def test_run_folder_leads_to_its_cache(tiny_cache: ActivationCache) -> None:
    assert ActivationCache(tiny_cache.path.parent).path == tiny_cache.path


def test_missing_cache_and_hook(tiny_cache: ActivationCache, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"no manifest.json there; make one with 'sae harvest'"):
        ActivationCache(tmp_path)
    for read in (tiny_cache.d_in, tiny_cache.statistics, lambda hook: next(tiny_cache.contexts(TRAIN, hook))):
        with pytest.raises(
            CacheError, match=r"hook 'nothing' is not in it; it holds blocks.1.hook_resid_pre, blocks.2"
        ):
            read("nothing")


@pytest.mark.parametrize("name", [SHARD, "tokens/held_out-00001.safetensors", "documents.json"])
def test_opening_names_missing_and_truncated_files(copy: Path, name: str) -> None:
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[:-1])
    with pytest.raises(CacheError, match=rf"{name} has {len(whole) - 1:,} bytes instead of {len(whole):,}; delete it"):
        ActivationCache(copy)
    (copy / name).unlink()
    with pytest.raises(CacheError, match=rf"{name} is missing; delete it and run the same 'sae harvest' to restore it"):
        ActivationCache(copy)


@pytest.mark.parametrize("name", [SHARD, "tokens/held_out-00001.safetensors", "documents.json"])
def test_verify_names_the_flipped_byte(copy: Path, name: str) -> None:
    files = 2 * 10 + 10 + 2  # two hooks and the tokens in 8 + 2 shards, the documents and the manifest
    assert verify(copy) == (files, [])
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    ActivationCache(copy)
    [problem] = verify(copy)[1]
    assert re.fullmatch(
        rf"'{copy / name}': damaged or changed: its SHA-256 is [0-9a-f]{{12}}… and should be [0-9a-f]{{12}}…; "
        "delete it and run the same 'sae harvest' to restore it",
        problem,
    )


def test_verify_names_everything_that_is_wrong(copy: Path) -> None:
    (copy / SHARD).unlink()
    (copy / "documents.json").write_bytes(b"")
    problems = verify(copy)[1]
    assert len(problems) == 2
    assert any(f"{SHARD}': missing; delete it" in problem for problem in problems)
    assert any(
        f"documents.json': damaged or changed: its SHA-256 is {hashlib.sha256(b'').hexdigest()[:12]}…" in problem
        for problem in problems
    )


def test_shard_that_is_no_safetensors_file(copy: Path) -> None:
    cache = ActivationCache(copy)
    (copy / SHARD).write_bytes(b"\xff" * 100)
    with pytest.raises(
        CacheError, match=rf"{SHARD}': damaged or changed: .*; delete it and run the same 'sae harvest'"
    ):
        list(cache.contexts(TRAIN, HOOK))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"complete": False}, r"the harvest is unfinished; run the same 'sae harvest' to finish it"),
        (
            {"format_version": 3, "news": 1},
            r"format version 3 is newer than this package reads \(2\); update the package",
        ),
        ({"format": "other"}, r"manifest.json is not of this toolkit \(no format 'sae-activations'\)"),
        ({"rows": None}, r"manifest.json': damaged \(rows: .*\); delete the cache and harvest it again"),
    ],
)
def test_manifests_of_another_kind(copy: Path, change: dict, message: str) -> None:
    record = json.loads((copy / MANIFEST).read_bytes())
    write_json(copy / MANIFEST, {**record, **change})
    with pytest.raises(CacheError, match=message):
        ActivationCache(copy)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff"])
def test_damaged_manifest(copy: Path, content: bytes) -> None:
    (copy / MANIFEST).write_bytes(content)
    with pytest.raises(CacheError, match=r"manifest.json': damaged or changed: its SHA-256 is"):
        ActivationCache(copy)
