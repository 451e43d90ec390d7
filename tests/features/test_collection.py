from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sae.architectures import ReLU, TopK
from sae.config.settings import FeaturesConfig
from sae.errors import CacheError, ConfigError
from sae.features import Features, collect
from sae.features.examples import reservoir_size
from sae.features.store import is_store_of
from tests.support.fake_cache import HOOK, Rows, write_fake_cache
from tests.support.feature_cache import FakeTokenizer, eligible_rows
from tests.support.feature_case import CONTEXT, D_SAE, DEAD, SETTINGS, Case, build_case
from tests.support.feature_reference import Reference


def all_examples(features: Features):
    for feature in features:
        for example in [*feature.top, *(example for group in feature.quantiles for example in group)]:
            yield feature, example


def test_counts_densities_means_and_maxima(case: Case, features: Features) -> None:
    for feature in features:
        values = [firing.value for firing in case.reference.firings(feature.index)]
        assert feature.count == len(values)
        assert feature.density == len(values) / case.reference.tokens
        assert feature.max == max(values, default=0.0)
        assert feature.mean == pytest.approx(sum(values) / max(1, len(values)), rel=1e-6)


def test_top_is_the_strongest_of_each_document(case: Case, features: Features) -> None:
    for feature in features:
        expected = case.reference.top(feature.index, SETTINGS.top)
        assert [(example.value, example.row) for example in feature.top] == [(f.value, f.row) for f in expected]
        assert [example.document for example in feature.top] == [f"text/{f.document}.txt" for f in expected]


def test_some_document_would_have_come_twice_without_the_rule(case: Case) -> None:
    repeated = 0
    for feature in range(D_SAE):
        firings = sorted(case.reference.firings(feature), key=lambda firing: (-firing.value, firing.row))
        repeated += len({firing.document for firing in firings[: SETTINGS.top]}) < min(SETTINGS.top, len(firings))
    assert repeated > 0


def test_quantiles_are_equal_shares_of_the_non_zero_activations(case: Case, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"per_quantile": 100})
    assert reservoir_size(settings) >= case.reference.tokens, "ranks are not exact"
    for feature in case.collect(tmp_path / "store", settings):
        shown = [example.row for group in feature.quantiles for example in group]
        assert len(shown) == len(set(shown)), "an example is shown in two places"
        for number, group in enumerate(feature.quantiles):
            share = settings.quantiles - 1 - number
            members = [
                firing.row
                for firing in case.reference.firings(feature.index)
                if case.reference.share(feature.index, firing.row, settings.quantiles) == share
            ]
            assert {example.row for example in group} <= set(members)
            assert len(group) == min(settings.per_quantile, len(members))
            assert [example.value for example in group] == sorted((e.value for e in group), reverse=True)


def test_where_the_reservoir_is_too_small_shares_are_exact_up_to_a_bin(case: Case, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"per_quantile": 40})
    feature = case.collect(tmp_path / "store", settings)[0]
    firings = case.reference.firings(0)
    assert len(firings) > reservoir_size(settings)
    for number, group in enumerate(feature.quantiles):
        share = settings.quantiles - 1 - number
        members = [f.value for f in firings if case.reference.share(0, f.row, settings.quantiles) == share]
        assert len(group) == settings.per_quantile
        for example in group:  # a bin is a sixteenth of an octave
            assert min(members) / (1 + 1 / 16) <= example.value <= max(members) * (1 + 1 / 16)


def test_a_rare_feature_shows_each_activation_once(features: Features) -> None:
    assert [[example.row for example in group] for group in features[5].quantiles] == [[15], [14], [200]]


def test_windows_hold_the_activations_around_and_stay_in_the_context(case: Case, features: Features) -> None:
    clipped = 0
    for feature, example in all_examples(features):
        rows = case.reference.window_rows(example.row, SETTINGS.before, SETTINGS.after)
        assert rows[example.position] == example.row
        assert example.activations == [case.reference.activation(row, feature.index) for row in rows]
        assert example.tokens == FakeVocabulary.pieces(case.tokens, rows)
        clipped += len(rows) < SETTINGS.before + 1 + SETTINGS.after
    assert clipped > 10


class FakeVocabulary:
    """Token 0 is special, token 1 + b is the byte b; all tokens of the case are ASCII."""

    @staticmethod
    def pieces(tokens: list[int], rows: list[int]) -> list[str]:
        return ["<|end|>" if tokens[row] == 0 else chr(tokens[row] - 1) for row in rows]


def test_masked_tokens_are_shown_but_do_not_fire(case: Case, features: Features) -> None:
    assert features[7].max < 50, "a masked token fired"
    shown = [
        (token, activation)
        for _, example in all_examples(features)
        for token, activation in zip(example.tokens, example.activations, strict=True)
    ]
    assert any(token == "<|end|>" for token, _ in shown)
    assert all(activation == 0 for token, activation in shown if token == "<|end|>")


def test_dead_features_have_no_examples(features: Features) -> None:
    dead = features[DEAD]
    assert dead.dead
    assert dead.top == []
    assert dead.quantiles == [[], [], []]
    assert (dead.count, dead.density, dead.max, dead.mean) == (0, 0, 0, 0)
    assert dead.histogram.counts == []
    assert [feature.index for feature in features if feature.dead] == [DEAD]


def test_histograms_count_every_activation(case: Case, features: Features) -> None:
    edges = np.array(features.info["histogram_edges"])
    for feature in features:
        values = [firing.value for firing in case.reference.firings(feature.index)]
        assert sum(feature.histogram.counts) == len(values)
        place = np.searchsorted(edges, feature.histogram.edges[0]) if values else 0
        expected = np.histogram(values, edges)[0]
        assert feature.histogram.counts == expected[place : place + len(feature.histogram.counts)].tolist()
        assert len(feature.histogram.edges) == len(feature.histogram.counts) + bool(values)


@pytest.mark.parametrize("batch_contexts", [1, 7])
def test_result_does_not_depend_on_the_batch_size(case: Case, tmp_path: Path, batch_contexts: int, monkeypatch) -> None:

    whole = case.collect(tmp_path / "whole")
    monkeypatch.setattr("sae.features.collector.ROOM", 1)
    parts = case.collect(tmp_path / "parts", batch_contexts=batch_contexts)
    assert list(whole) == list(parts)


def test_blocks_that_cut_documents_keep_one_example_of_each(tmp_path: Path, monkeypatch) -> None:

    case = build_case(tmp_path / "activations", document_length=100)
    monkeypatch.setattr("sae.features.collector.ROOM", 1)
    for feature in case.collect(tmp_path / "store", batch_contexts=1):
        expected = case.reference.top(feature.index, SETTINGS.top)
        assert [(example.value, example.row) for example in feature.top] == [(f.value, f.row) for f in expected]


def test_seed_changes_the_samples_and_nothing_else(case: Case, features: Features, tmp_path: Path) -> None:
    other = case.collect(tmp_path / "other", seed=1)
    assert features[0].quantiles != other[0].quantiles
    assert features[0].top == other[0].top
    assert [feature.count for feature in features] == [feature.count for feature in other]


def test_padding_of_relu_codes_does_not_fire(case: Case, features: Features) -> None:
    values, _ = case.dictionary.encode_sparse(next(case.cache.contexts("train", HOOK)).activations)
    assert (values == 0).any()
    assert all(example.value > 0 for _, example in all_examples(features))


def test_tokens_stop_the_scan_at_a_context(case: Case, tmp_path: Path) -> None:
    store = case.collect(tmp_path / "store", SETTINGS.model_copy(update={"tokens": 100}))
    assert store.info["rows"] == 96
    assert all(example.row < 96 for _, example in all_examples(store))
    assert len(store.documents) == 6


def test_progress_ends_at_all_tokens(case: Case, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    case.collect(tmp_path / "store", batch_contexts=5, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (403, 403)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_an_interrupt_leaves_the_store_before(case: Case, features: Features) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    before = {file.name: file.read_bytes() for file in features.path.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        case.collect(features.path, SETTINGS.model_copy(update={"top": 2}), batch_contexts=3, progress=interrupt)
    assert {file.name: file.read_bytes() for file in features.path.iterdir()} == before


def test_samples_of_a_frequent_feature_are_uniform_over_its_shares(tmp_path: Path) -> None:
    """A feature that fires far more often than the reservoir holds: shares from the histogram, within 2 % of exact."""
    from tests.support.feature_cache import make_cache

    generator = torch.Generator().manual_seed(1)
    rows, width = 20_000, 16
    x = torch.randn(rows, width, generator=generator).exp()
    dictionary = ReLU(width, width)
    with torch.no_grad():
        dictionary.W_enc.copy_(torch.eye(width))
        dictionary.W_dec.copy_(torch.eye(width))
    cache = make_cache(tmp_path, x, torch.ones(rows), torch.arange(rows) // 50, 50, shard_contexts=100)
    settings = FeaturesConfig(top=3, quantiles=4, per_quantile=8)
    store = collect(dictionary, cache, tmp_path / "store", settings, hook=HOOK, tokenizer=FakeTokenizer())
    seen = []
    for feature in store:
        values = np.sort(x[torch.arange(rows) % 50 != 0, feature.index].numpy())
        for number, group in enumerate(feature.quantiles):
            ranks = np.searchsorted(values, [example.value for example in group]) / len(values)
            share = 3 - number
            assert len(group) == 8
            assert ranks.min() > share / 4 - 0.02
            assert ranks.max() < (share + 1) / 4 + 0.02
            seen += ranks.tolist()
    # 512 uniform draws: the mean of the ranks is 1/2 within four standard errors
    assert abs(np.mean(seen) - 0.5) < 4 * 0.289 / 512**0.5
    assert abs(np.var(seen) - 1 / 12) < 0.01


def test_topk_dictionaries(case: Case, tmp_path: Path) -> None:
    dictionary = TopK(D_SAE, D_SAE, k=2)
    dictionary.load_state_dict(case.dictionary.state_dict())
    store = collect(
        dictionary, case.cache, tmp_path / "store", SETTINGS, hook=HOOK, tokenizer=FakeTokenizer(), batch_contexts=3
    )
    codes = torch.cat([
        dictionary.encode(batch.activations)[batch.eligible] for batch in case.cache.contexts("train", HOOK)
    ])  # fmt: skip
    assert [feature.count for feature in store] == (codes > 0).sum(0).tolist()


def test_last_context_may_be_short(case: Case, tmp_path: Path) -> None:
    assert case.reference.rows % CONTEXT == 7
    store = case.collect(tmp_path / "store", SETTINGS.model_copy(update={"per_quantile": 100}))
    last = [example for _, example in all_examples(store) if example.row >= 396]
    assert last
    assert all(len(example.tokens) <= 7 for example in last)


def test_errors(case: Case, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"features\.tokens=5: less than one context of 12 tokens; raise it"):
        case.collect(tmp_path / "store", SETTINGS.model_copy(update={"tokens": 5}))
    narrow = ReLU(4, 8)
    with pytest.raises(ConfigError, match="activations have 8 numbers, the dictionary takes 4; give the hook"):
        collect(narrow, case.cache, tmp_path / "store", SETTINGS, hook=HOOK, tokenizer=FakeTokenizer())
    with pytest.raises(CacheError, match=r"hook 'blocks.9.hook_resid_pre' is not in it"):
        collect(case.dictionary, case.cache, tmp_path, SETTINGS, hook="blocks.9.hook_resid_pre", tokenizer=None)


def test_the_held_out_split_can_be_scanned(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, D_SAE, generator=generator)
    tokens, documents = torch.arange(120) % 40, torch.arange(120) // 15
    split = {"train": Rows(torch.randn(60, D_SAE, generator=generator), tokens[:60], documents[:60])}
    cache = write_fake_cache(
        tmp_path / "cache", {**split, "held_out": Rows(x, tokens, documents)}, context_length=CONTEXT,
        document_names={"train": [f"train/{n}" for n in range(4)], "held_out": [f"other/{n}" for n in range(8)]},
    )  # fmt: skip
    dictionary = ReLU(D_SAE, D_SAE)
    with torch.no_grad():
        dictionary.W_enc.copy_(torch.eye(D_SAE))
        dictionary.W_dec.copy_(torch.eye(D_SAE))
    arguments = {"hook": HOOK, "tokenizer": FakeTokenizer()}
    store = collect(dictionary, cache, tmp_path / "store", SETTINGS, split="held_out", **arguments)
    reference = Reference(x.tolist(), documents.tolist(), eligible_rows(tokens, CONTEXT).tolist(), CONTEXT)
    assert (store.info["split"], store.info["rows"], store.info["tokens"]) == ("held_out", 120, reference.tokens)
    assert store.documents == [f"other/{n}" for n in range(8)]
    for feature in store:
        expected = reference.top(feature.index, SETTINGS.top)
        assert [(example.value, example.row) for example in feature.top] == [(f.value, f.row) for f in expected]
    identity, activations = store.info["dictionary_sha256"], cache.manifest.identity(HOOK)
    assert not is_store_of(store.path, identity, activations, SETTINGS), "a run's store is of the training split"
    trained = collect(dictionary, cache, tmp_path / "store", SETTINGS, **arguments)
    assert trained.info["split"] == "train"
    assert is_store_of(trained.path, identity, activations, SETTINGS)
