"""Caches of several sources, and that those of one source have stayed what they were."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sae.activations import ActivationCache
from sae.activations.harvest import harvest
from sae.config.settings import RunConfig
from sae.config.splits import HELD_OUT, SPLITS, TRAIN
from sae.errors import CacheError, DataError
from sae.model.language_model import LanguageModel
from sae.runs.verification import verify
from sae.text.corpus import is_held_out
from tests.support.harvest_case import Config, contents


@pytest.fixture(scope="module")
def letters(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second source: the same words in other documents, three lines each."""
    path = tmp_path_factory.mktemp("more") / "letters.jsonl"
    lines = [line for file in sorted(text_folder.iterdir()) for line in file.read_text().splitlines()[::-1]]
    texts = ["\n".join(lines[start : start + 3]) for start in range(0, len(lines), 3)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def mixed_config(tiny_config: Config, text_folder: Path, letters: Path) -> Config:
    def make(**overrides: Any) -> RunConfig:
        settings = {
            "data__source": [str(text_folder), str(letters)], "data__weights": [0.7, 0.3],
            "data__section_characters": 200,
        }  # fmt: skip
        return tiny_config(**{**settings, **overrides})

    return make


def owners(cache: ActivationCache, split: str) -> list[str]:
    """The source of every row, by the names of the documents."""
    names = cache.documents(split)
    numbers = [number for batch in cache.contexts(split) for number in batch.documents.flatten().tolist()]
    return [names[number].partition("/")[0] for number in numbers]


def test_a_mixed_cache_says_what_each_source_gave(mixed_config: Config, language_model: LanguageModel) -> None:
    cache = harvest(mixed_config(), language_model)
    longest = 100  # tokens of the longest section
    for split, rows in ((TRAIN, 1000), (HELD_OUT, 200)):
        of_rows = owners(cache, split)
        counted = {label: of_rows.count(label) for label in ("corpus", "letters.jsonl")}
        assert cache.source_tokens(split) == counted
        assert sum(counted.values()) == rows
        assert abs(counted["corpus"] - 0.7 * rows) < longest
        assert min(counted.values()) > 0
    data = cache.manifest.data
    assert data["source"][1].endswith("letters.jsonl")
    assert data["weights"] == [0.7, 0.3]
    train, held_out = cache.source_tokens(), cache.source_tokens(HELD_OUT)
    assert f"1,000 train ({train['corpus']} of corpus + {train['letters.jsonl']} of letters.jsonl), " in repr(cache)
    assert f"200 held_out ({held_out['corpus']} of corpus + " in repr(cache)
    assert verify(cache.path)[1] == []


def test_reweighting_moves_no_document_to_the_other_side(mixed_config: Config, language_model: LanguageModel) -> None:
    caches = [
        harvest(mixed_config(data__weights=weights, out=f"{mixed_config().out}-{number}"), language_model)
        for number, weights in enumerate(([0.7, 0.3], [1, 9], None))
    ]
    train = set().union(*(cache.documents(TRAIN) for cache in caches))
    held_out = set().union(*(cache.documents(HELD_OUT) for cache in caches))
    assert not train & held_out
    assert len({cache.manifest.identity("blocks.1.hook_resid_pre") for cache in caches}) == 3
    for names, side in ((train, False), (held_out, True)):
        assert all(is_held_out(name.partition("/")[2], 0, 0.25) is side for name in names)


def test_other_sources_or_weights_are_another_cache(
    mixed_config: Config, tiny_config: Config, text_folder: Path, letters: Path, language_model: LanguageModel
) -> None:
    cache = harvest(mixed_config(), language_model)
    before = contents(cache.path)
    harvest(mixed_config(data__weights=[7, 3]), language_model)
    for settings, message in (
        (
            {"data__weights": [0.6, 0.4]},
            r"made with data.weights=\[0.7, 0.3\], now \[0.6, 0.4\] is asked for; set harv",
        ),
        ({"data__weights": None}, r"made with data.weights=\[0.7, 0.3\], now \[0.5, 0.5\]"),
        (
            {"data__source": [str(letters), str(text_folder)]},
            r"made with data.source=\['.*corpus', '.*letters.jsonl'\], no",
        ),
    ):
        with pytest.raises(CacheError, match=message):
            harvest(mixed_config(**settings), language_model)
    with pytest.raises(CacheError, match=r"made with data.source=\[.*\], now '.*corpus'"):
        harvest(tiny_config(), language_model)
    assert contents(cache.path) == before


def test_one_source_is_what_it_was(
    tiny_config: Config, tiny_cache: ActivationCache, text_folder: Path, letters: Path, mixed_config: Config,
    language_model: LanguageModel,
) -> None:  # fmt: skip
    """No prefix in the names, and nothing in the manifest of several sources."""
    config = tiny_config()
    cache = harvest(config, language_model)
    data = cache.manifest.data
    assert len(data["fingerprints"]) == 1
    assert {key: value for key, value in data.items() if key != "fingerprints"} == {
        "source": text_folder.name, "duplicates": 0, "token_columns": ["tokens", "documents"], "reading": 4,
        "subset": None, "split": "train", "column": "text", "section_characters": None,
        "shuffle_documents": None, "holdout_fraction": 0.25, "holdout_seed": 0,
    }  # fmt: skip
    before = contents(cache.path)
    expected = {split: packed_plainly(config, split, text_folder, language_model) for split in SPLITS}
    for split in SPLITS:
        tokens, documents = expected[split]
        shards = [cache.token_shard(split, number) for number in range(cache.shards(split))]
        assert [token for shard, _ in shards for token in shard.tolist()] == tokens
        names = cache.documents(split)
        assert [names[number] for _, shard in shards for number in shard.tolist()] == documents
        assert cache.source_tokens(split) == {}
        assert list(dict.fromkeys(documents)) == names
    assert harvest(tiny_config(data__source=[str(text_folder)]), language_model).path == cache.path
    assert contents(cache.path) == before
    with pytest.raises(CacheError, match=r"made with data.source='.*corpus', now \['.*corpus', '.*letters.jsonl'\]"):
        harvest(mixed_config(), language_model)


def packed_plainly(config: RunConfig, split: str, folder: Path, model: LanguageModel) -> tuple[list[int], list[str]]:
    """File after file, token after token: every row's token, and its document's name."""
    rows = config.data.tokens if split == TRAIN else config.data.held_out_tokens

    def stream() -> Iterator[tuple[int, str]]:
        for path in sorted(folder.iterdir()):
            if is_held_out(path.name, 0, 0.25) is (split == HELD_OUT):
                ids = model.tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False)
                yield from ((token, path.name) for token in (*ids, model.separator))

    tokens: list[int] = []
    documents: list[str] = []
    for token, name in stream():
        for one in (model.bos, token) if len(tokens) % 16 == 0 else (token,):
            tokens.append(one)
            documents.append(name)
        if len(tokens) >= rows:
            break
    return tokens[:rows], documents[:rows]


def test_lost_text_of_a_mix_is_restored(mixed_config: Config, language_model: LanguageModel) -> None:
    cache = harvest(mixed_config(), language_model)
    before = contents(cache.path)
    for lost in ("documents.json", "tokens/train-00001.safetensors"):
        (cache.path / lost).unlink()
        assert contents(harvest(mixed_config(), language_model).path) == before


def test_a_source_that_runs_out_is_in_nobodys_way(mixed_config: Config, language_model: LanguageModel) -> None:
    """The same folder takes the request that the message proposes."""
    quick = {"harvest__batch_contexts": 64, "harvest__shard_contexts": 64}
    with pytest.raises(DataError, match=r"the train documents hold .* 0.7 of data.tokens=50,000 were asked") as caught:
        harvest(mixed_config(data__tokens=50_000, **quick), language_model)
    enough = int(str(caught.value).partition("lower data.tokens to ")[2].partition(", or")[0].replace(",", ""))
    assert harvest(mixed_config(data__tokens=enough, **quick), language_model).rows() == enough > 5000


@pytest.mark.slow
def test_killed_harvests_of_a_mix_end_with_the_same_bytes(
    tiny_model: Path, text_folder: Path, letters: Path, tmp_path: Path
) -> None:
    script = Path(__file__).parents[1] / "support" / "killed_harvest.py"
    command = [sys.executable, str(script), str(tiny_model), f"{text_folder}{os.pathsep}{letters}", str(tmp_path), "4"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=one_thread)
    assert answer.returncode == 0, answer.stderr[-2000:]
    report = json.loads(answer.stdout.splitlines()[-1])
    where = [state for _, killed, state in report["states"] if killed]
    assert "text" in where and "activations" in where, report
    whole = contents(tmp_path / "whole")
    manifest = json.loads(whole["activations/manifest.json"])
    assert manifest["data"]["weights"] == [0.7, 0.3]
    assert set(manifest["data"]["source_tokens"]["train"]) == {"corpus", "letters.jsonl"}
    runs = [path for path in tmp_path.iterdir() if path.name != "whole"]
    assert len(runs) >= 6
    for run in runs:
        assert contents(run) == whole, run.name
