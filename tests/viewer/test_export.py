"""Features as files of Neuronpedia and SAEDashboard: their schemas, and every number against a slow reference."""

from __future__ import annotations

import gzip
import json
import math
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sae
from sae.errors import CacheError, ConfigError, UnknownFeatureError
from sae.features import Feature, Features, Histogram
from sae.viewer import dashboard, neuronpedia
from tests.support.feature_case import CONTEXT, D_SAE, DEAD, SETTINGS, Case, build_case
from tests.support.viewer_schemas import DashboardBatch, RunSettings, Skipped, imported

VOCABULARY = 257
EXACT = 6e-6
"""Relative error of six significant digits."""


@dataclass(frozen=True)
class Made:
    """A store, and what it was made of."""

    case: Case
    store: Features
    model: Any
    W_U: list[list[float]]

    @property
    def directions(self) -> list[list[float]]:
        """Rows of W_dec."""
        return self.case.dictionary.W_dec.tolist()

    def export(self, folder: Path, to: str = "neuronpedia", **settings: Any) -> Any:
        arguments = {"dictionary": self.case.dictionary, "language_model": self.model, **settings}
        return sae.export_features(self.store, folder, to, **arguments)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Decoder rows are of random directions; the vocabulary is bytes."""
    folder = tmp_path_factory.mktemp("made")
    case = build_case(folder / "activations")
    generator = torch.Generator().manual_seed(3)
    directions = torch.randn(D_SAE, D_SAE, generator=generator)
    with torch.no_grad():
        case.dictionary.W_dec.copy_(directions / directions.norm(dim=1, keepdim=True))
    W_U = torch.randn(D_SAE, VOCABULARY + 3, generator=generator)
    W_U[:, VOCABULARY:] = 99  # rows that pad the embedding and are no tokens
    model = SimpleNamespace(is_residual=lambda hook: True, unembedding=lambda: W_U)
    return Made(case, case.collect(folder / "features", language_model=model), model, W_U[:, :VOCABULARY].tolist())


@pytest.fixture(scope="module")
def tables(made: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("exported") / "v1"
    made.export(folder, set_name="res-sae", creator="A. Nobody")
    return imported(folder)


@pytest.fixture(scope="module")
def batch(made: Made, tmp_path_factory: pytest.TempPathFactory) -> DashboardBatch:
    folder = tmp_path_factory.mktemp("exported") / "dashboard"
    made.export(folder, "saedashboard", set_name="res-sae")
    return DashboardBatch.model_validate(json.loads((folder / "batch-0.json").read_bytes()))


def without_zero(tokens: list[str]) -> list[str]:
    """Texts as the import keeps them: PostgreSQL has no character 0."""
    return [token.replace("\0", " ") for token in tokens]


def logits(made: Made, feature: int) -> list[float]:
    row = made.directions[feature]
    return [sum(row[d] * made.W_U[d][token] for d in range(D_SAE)) for token in range(VOCABULARY)]


def test_the_rows_refer_to_each_other(made: Made, tables: dict[str, list[Any]]) -> None:
    source, of_set, [model] = tables["source"][0], tables["sourceset"][0], tables["model"]
    assert (model.id, source.id, of_set.name) == ("fake", "1-res-sae", "res-sae")
    assert (of_set.creatorName, of_set.description) == ("A. Nobody", f"8 features of {made.store.info['hook']}")
    assert (source.num_prompts, source.num_tokens_in_prompt) == (math.ceil(403 / CONTEXT), CONTEXT)
    assert [row.index for row in tables["features"]] == [str(feature) for feature in range(D_SAE)]


def test_frequencies_are_those_of_all_tokens(made: Made, tables: dict[str, list[Any]], batch: DashboardBatch) -> None:
    """SAEDashboard divides by all positions; it sets activations on those that are masked to 0."""
    for feature, (neuron, shown) in enumerate(zip(tables["features"], batch.features, strict=True)):
        firings = made.case.reference.firings(feature)
        assert neuron.frac_nonzero == shown.frac_nonzero == pytest.approx(len(firings) / 403, rel=EXACT)
        assert neuron.maxActApprox == max((firing.value for firing in firings), default=0)


def test_histograms_count_every_firing(made: Made, tables: dict[str, list[Any]], batch: DashboardBatch) -> None:
    edges = made.store.info["histogram_edges"]
    for feature, (neuron, shown) in enumerate(zip(tables["features"], batch.features, strict=True)):
        counts = [0] * (len(edges) - 1)
        for firing in made.case.reference.firings(feature):
            counts[min(max(bisect_right(edges, firing.value) - 1, 0), len(counts) - 1)] += 1
        filled = [place for place, count in enumerate(counts) if count]
        span = range(filled[0], filled[-1] + 1) if filled else range(0)
        assert neuron.freq_hist_data_bar_heights == [counts[place] for place in span]
        centres = [(edges[place] + edges[place + 1]) / 2 for place in span]
        assert neuron.freq_hist_data_bar_values == pytest.approx(centres, rel=EXACT)
        assert shown.freq_hist_data_bar_heights == neuron.freq_hist_data_bar_heights
        assert shown.freq_hist_data_bar_values == neuron.freq_hist_data_bar_values
    assert tables["features"][DEAD].freq_hist_data_bar_heights == []


def test_logits_and_their_histogram(made: Made, tables: dict[str, list[Any]], batch: DashboardBatch) -> None:
    for feature, (neuron, shown) in enumerate(zip(tables["features"], batch.features, strict=True)):
        effects = logits(made, feature)
        order = sorted(range(VOCABULARY), key=effects.__getitem__)
        text = made.store.vocabulary.text
        n = SETTINGS.logits
        assert shown.neg_str == [text(token) for token in order[:n]]
        assert shown.pos_str == [text(token) for token in order[::-1][:n]]
        assert (neuron.neg_str, neuron.pos_str) == (without_zero(shown.neg_str), without_zero(shown.pos_str))
        assert neuron.neg_values == shown.neg_values == pytest.approx([effects[token] for token in order[:n]], rel=1e-4)
        assert neuron.pos_values == pytest.approx([effects[token] for token in order[::-1][:n]], rel=1e-4)
        low, high = min(effects), max(effects)
        width, heights = (high - low) / 50, [0] * 50
        for effect in effects:
            heights[min(int((effect - low) / width), 49)] += 1
        theirs = neuron.logits_hist_data_bar_heights
        assert len(theirs) == 50 and sum(theirs) == VOCABULARY
        assert sum(abs(one - other) for one, other in zip(theirs, heights, strict=True)) <= 2, "one at an edge"
        centres = [low + (bar + 0.5) * width for bar in range(50)]
        assert neuron.logits_hist_data_bar_values == pytest.approx(centres, rel=1e-4, abs=1e-5)
        assert shown.logits_hist_data_bar_heights == theirs


def test_equal_bars_of_known_numbers() -> None:
    """0, 1, …, 100 in 50 bars of width 2: two each, and 100 with the last two; a single value is one bar."""
    heights, centres = dashboard.equal_bars(torch.arange(101.0))
    assert heights == [2] * 49 + [3]
    assert centres == [float(2 * bar + 1) for bar in range(50)]
    assert dashboard.equal_bars(torch.full((7,), -1.5)) == ([7], [-1.5])


def test_neurons_are_those_that_the_decoder_writes_to(made: Made, tables: dict[str, list[Any]]) -> None:
    for row, neuron in zip(made.directions, tables["features"], strict=True):
        order = sorted(range(D_SAE), key=lambda d: -row[d])[:3]  # the largest, not the largest by size
        assert neuron.neuron_alignment_indices == order
        assert neuron.neuron_alignment_values == pytest.approx([row[d] for d in order], rel=EXACT)
        parts = [abs(row[d]) / sum(map(abs, row)) for d in order]
        assert neuron.neuron_alignment_l1 == pytest.approx(parts, rel=1e-5)


def test_neighbours_begin_with_the_feature_itself(made: Made, tables: dict[str, list[Any]]) -> None:
    """Neuronpedia's page leaves the feature out of the list, and shows value j + 1 next to the neighbour j."""
    for feature, neuron in enumerate(tables["features"]):
        cosines = {
            other: sum(one * two for one, two in zip(made.directions[feature], row, strict=True))
            for other, row in enumerate(made.directions)
        }
        order = sorted(cosines, key=lambda other: -cosines[other])[: 1 + SETTINGS.neighbours]
        assert order[0] == feature
        assert neuron.topkCosSimIndices == order
        assert neuron.topkCosSimValues == pytest.approx([cosines[other] for other in order], rel=1e-4, abs=1e-6)


def test_activations_are_the_stored_examples(made: Made, tables: dict[str, list[Any]], batch: DashboardBatch) -> None:
    reference, text = made.case.reference, made.store.vocabulary.pieces
    for feature in range(D_SAE):
        stored = made.store[feature]
        examples = [*stored.top, *(example for group in stored.quantiles for example in group)]
        rows = [row for row in tables["activations"] if row.index == str(feature)]
        assert len(rows) == len(examples) == len(batch.features[feature].activations)
        for row, example, shown in zip(rows, examples, batch.features[feature].activations, strict=True):
            window = reference.window_rows(example.row, SETTINGS.before, SETTINGS.after)
            values = [reference.activation(near, feature) for near in window]
            assert row.values == shown.values == values
            assert shown.tokens == example.tokens == text([made.case.tokens[near] for near in window])
            assert row.tokens == without_zero(example.tokens)
            place = window.index(example.row)
            assert row.qualifyingTokenIndex == shown.qualifying_token_index == place
            assert (row.maxValue, row.minValue) == (max(values), min(values))
            assert row.maxValueTokenIndex == values.index(max(values))
            assert (row.binMin, row.binMax, row.binContains) == (shown.bin_min, shown.bin_max, shown.bin_contains)
    assert not [row for row in tables["activations"] if row.index == str(DEAD)]


def test_the_strongest_belong_to_no_interval(made: Made, tables: dict[str, list[Any]]) -> None:
    for feature in range(D_SAE):
        firings = made.case.reference.top(feature, SETTINGS.top)
        strongest = [row for row in tables["activations"] if row.index == str(feature) and row.binMin == -1]
        assert [row.values[row.qualifyingTokenIndex] for row in strongest] == [firing.value for firing in firings]
        assert {(row.binMax, row.binContains) for row in strongest} == ({(firings[0].value, -1)} if firings else set())


def test_intervals_hold_their_quantile_and_say_how_many_tokens(made: Made, tables: dict[str, list[Any]]) -> None:
    """The tightest edges around the equal-count share, by enumeration of all firings."""
    edges, shares = made.store.info["histogram_edges"], SETTINGS.quantiles
    seen = 0
    for feature in range(D_SAE):
        values = sorted(firing.value for firing in made.case.reference.firings(feature))
        rows = [row for row in tables["activations"] if row.index == str(feature) and row.binMin != -1]
        sizes = [len(group) for group in made.store[feature].quantiles]
        groups = [number for number, size in enumerate(sizes) for _ in range(size)]
        for row, group in zip(rows, groups, strict=True):
            share = shares - 1 - group
            first, last = share * len(values) // shares, -(-(share + 1) * len(values) // shares) - 1
            low = max(edge for edge in edges if edge <= values[first])
            above = min(edge for edge in edges if edge > values[last])
            high = values[-1] if values[-1] < above else above
            assert (row.binMin, row.binMax) == (pytest.approx(low, rel=EXACT), pytest.approx(high, rel=EXACT))
            inside = sum(low <= value < above for value in values)
            assert row.binContains == pytest.approx(inside / 403, rel=EXACT)
            assert row.binMin <= row.values[row.qualifyingTokenIndex] <= row.binMax
            seen += 1
    assert seen > 30


def test_the_lowest_bin_reaches_down_to_zero() -> None:
    """Its counts include everything below its edges, and those of the highest everything above."""
    histogram = Histogram([1.0, 2.0, 4.0], [2, 2])
    feature = Feature(0, 0.1, 4, False, 9.0, 2.0, histogram, [], [[], []], None, None, [])
    assert dashboard.interval_of(feature, 0, 2, 100, first_edge=1.0) == dashboard.Interval(0.0, 2.0, 0.02)
    assert dashboard.interval_of(feature, 0, 2, 100, first_edge=0.5) == dashboard.Interval(1.0, 2.0, 0.02)
    assert dashboard.interval_of(feature, 1, 2, 100, first_edge=0.5) == dashboard.Interval(2.0, 9.0, 0.02)
    assert dashboard.interval_of(feature, 0, 1, 100, first_edge=0.5) == dashboard.Interval(1.0, 9.0, 0.04)


@pytest.mark.parametrize(
    "token",
    [
        'quote " and \\ slash', "\\u0000", "\\\\u0000", "\\\0", "line\nend\r\n\ttab", "é\u2028\u200b😀", "</script>",
        "'; --",         "Ġ▁<0x0A>", "\x7f\x85\x1b[31m",
    ],
)  # fmt: skip
def test_tokens_arrive_as_they_are(token: str, make_features, tmp_path: Path) -> None:
    """PostgreSQL's JSON has no character 0, and Neuronpedia's import makes a space of it."""
    store = make_features(token)
    sae.export_features(store, tmp_path / "n", "neuronpedia", dictionary=None)
    sae.export_features(store, tmp_path / "s", "saedashboard")
    examples = [example.tokens for example in store[0].top]
    assert token in examples[0]
    rows = [row for row in imported(tmp_path / "n")["activations"] if row.index == "0" and row.binMin == -1]
    assert [row.tokens for row in rows] == list(map(without_zero, examples))
    batch = DashboardBatch.model_validate(json.loads((tmp_path / "s" / "batch-0.json").read_bytes()))
    assert [shown.tokens for shown in batch.features[0].activations if shown.bin_min == -1] == examples
    assert batch.features[0].pos_str[0] == token
    assert batch.features[1].pos_str[0] == "\\xe2", "half a character is written as its byte"


def test_lines_for_the_database_say_the_same() -> None:
    row = {"tokens": ["\\u0000", "\\\\u0000", "\\n", '\\"u0000', "\0", "\\\0", "\\", "u0000", "\\u00000\\\\"]}
    line = neuronpedia.database_json(row).decode("ascii")
    assert json.loads(line) == row
    replaced = json.loads(line.replace("\\u0000", " "))
    assert replaced["tokens"] == [token.replace("\0", " ") for token in row["tokens"]]


def test_chosen_features_and_files(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuronpedia, "_AT_ONCE", 2)
    done = made.export(tmp_path / "n", indices=[5, 1, 5, DEAD, 2, 0])
    assert (done.title, done.features, done.source) == ("Neuronpedia", 5, "fake/1-" + done.source.split("-", 1)[1])
    assert {path.name for path in done.files if path.parent.name == "activations"} == {
        f"batch-{number}.jsonl.gz" for number in range(3)
    }
    assert [row.index for row in imported(tmp_path / "n")["features"]] == ["5", "1", str(DEAD), "2", "0"]
    monkeypatch.setattr(neuronpedia, "_MOST_FILES", 2)
    assert len(list((made.export(tmp_path / "few").files[0].parent).iterdir())) == 2, "the import lists no more"
    made.export(tmp_path / "s", "saedashboard", indices=[3, 1], set_name="res-sae", model="gpt2-small")
    skipped = Skipped.model_validate(json.loads((tmp_path / "s" / "skipped_indexes.json").read_bytes()))
    assert (skipped.model_id, skipped.layer, skipped.sae_set) == ("gpt2-small", "1", "res-sae")
    assert skipped.skipped_indexes == [0, 2, 4, 5, 6, 7]
    settings = RunSettings.model_validate(json.loads((tmp_path / "s" / "run_settings.json").read_bytes()))
    assert (settings.n_quantiles, settings.top_acts_group_size, settings.quantile_group_size) == (3, 5, 2)


def test_what_only_a_dead_feature_has_is_complete(made: Made, tmp_path: Path) -> None:
    """A file of activations without a line has no columns, and the import would stop there."""
    made.export(tmp_path / "n", indices=[DEAD])
    assert not list(tmp_path.rglob("activations"))
    [path] = tmp_path.rglob("features/*.jsonl.gz")
    neuron = json.loads(gzip.decompress(path.read_bytes()))
    assert (neuron["frac_nonzero"], neuron["maxActApprox"], neuron["freq_hist_data_bar_heights"]) == (0, 0, [])
    assert len(neuron["pos_str"]) == SETTINGS.logits


def test_without_dictionary_and_model_the_columns_are_empty_and_reported(made: Made, tmp_path: Path) -> None:
    bare = made.export(tmp_path / "n", dictionary=None)
    for neuron in imported(tmp_path / "n")["features"]:
        assert neuron.neuron_alignment_indices == neuron.neuron_alignment_l1 == neuron.logits_hist_data_bar_values == []
    whole = made.export(tmp_path / "w")
    always = {"correlated_neurons_*, correlated_features_*", "neuronsPerLayer and owner of the model"}
    unknown = {"layers of the model", "dataset"}  # this cache's model and text have no facts
    assert {part.partition(":")[0] for part in whole.missing} == always | unknown
    assert {part.partition(":")[0] for part in bare.missing} == always | unknown | {
        "neuron_alignment_*", "logits_hist_data_*",
    }  # fmt: skip


def test_the_same_export_is_the_same_bytes(made: Made, tmp_path: Path) -> None:
    """Keys of rows as well: what is imported twice is there once."""
    one, two = made.export(tmp_path / "one", set_name="a"), made.export(tmp_path / "two", set_name="a")
    assert [path.read_bytes() for path in one.files] == [path.read_bytes() for path in two.files]
    made.export(tmp_path / "three", set_name="b")
    keys = [{row.id for row in imported(tmp_path / name)["activations"]} for name in ("one", "three")]
    assert not keys[0] & keys[1], "rows of another set would be dropped"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"to": "other"}, "viewer 'other': files are written for neuronpedia, saedashboard"),
        ({"set_name": "Res_SAE"}, "set 'Res_SAE': Neuronpedia takes lower-case letters.*such as 'res-sae'"),
        ({"set_name": "a--b"}, "set 'a--b'.*such as 'a-b'"),
        ({"set_name": "neurons"}, "not 'neurons'; such as 'neurons-sae'"),
        ({"model": "Org/Model"}, "model 'Org/Model': Neuronpedia's ids have lower-case"),
        ({"indices": []}, "no features to export"),
        ({"dictionary": sae.ReLU(D_SAE, D_SAE)}, "not of this dictionary"),
    ],
)
def test_what_viewers_do_not_take_is_refused(
    made: Made, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        made.export(tmp_path / "new", **settings)
    assert not (tmp_path / "new").exists()


def test_features_that_are_not_there_and_folders_that_are(made: Made, tmp_path: Path) -> None:
    with pytest.raises(UnknownFeatureError, match="feature 8: the store has features 0 to 7"):
        made.export(tmp_path / "new", indices=[0, 8])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(ConfigError, match=r"full': already there; give a new folder"):
        made.export(tmp_path / "full")
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match=r"cannot write .*inside'"):
        made.export(tmp_path / "file" / "inside")
    (tmp_path / "empty").mkdir()
    assert made.export(tmp_path / "empty", indices=[1]).features == 1


def test_an_interrupted_export_leaves_nothing(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    calls = []

    def stop(*arguments: Any) -> bytes:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return b"{}\n"

    monkeypatch.setattr(neuronpedia, "database_json", stop)
    with pytest.raises(KeyboardInterrupt):
        made.export(tmp_path / "new")
    assert len(calls) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::sae.files.hashes.UnhashedWarning")
def test_names_come_from_the_run(make_features, tmp_path: Path) -> None:
    store = make_features("word")
    run = tmp_path / "8 Runs of GPT__2"
    run.mkdir()
    store.path.rename(run / "features")
    assert sae.export_features(run, tmp_path / "n", "neuronpedia").source == "fake/1-runs-of-gpt-2"
    index = run / "features" / "features.json"
    record = json.loads(index.read_text(encoding="utf-8"))
    for name, expected in (("gpt2", "gpt2-small"), ("org/Llama-3.1 8B", "llama-3.1-8b"), (None, "unknown")):
        index.write_text(json.dumps({**record, "model": name}), encoding="utf-8")
        (run / "features" / "SHA256SUMS").unlink(missing_ok=True)
        done = sae.export_features(run, tmp_path / str(expected), "neuronpedia", indices=[0])
        assert done.source.partition("/")[0] == expected
