"""Trainings of crosscoders: planted features are found at their sites, scales are folded, resumption is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import sae
from sae.architectures import ARCHITECTURES
from sae.config.settings import DictionaryConfig, TrainConfig
from sae.dictionary.base import Dictionary
from sae.dictionary.frame import Frame
from sae.errors import ConfigError
from sae.training import IterableSource, JoinedSource, Recipe, train, train_all
from sae.training.normalisation import fold_, normalisations_of
from sae.training.recipe import build
from tests.support.quick import quick_for

WIDTHS, GROUP, BATCH = (24, 20), 16, 512
PLANTED = 107
SCALES, MEANS = (1.0, 40.0), (0.5, 300.0)


class Planted:
    """Sums of unit directions at two sites: those of `GROUP` features at both, of as many at the first alone, and of as
    many at the second alone. The second site is forty times as large, and far from 0.

    Args:
        permuted: rows of the second site do not belong to those of the first.
    """

    def __init__(self, *, permuted: bool = False) -> None:
        random = np.random.default_rng([PLANTED, 0])
        drawn = [random.standard_normal((3 * GROUP, width)) for width in WIDTHS]
        self.directions = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in drawn]
        self.directions[0][2 * GROUP :] = 0
        self.directions[1][GROUP : 2 * GROUP] = 0
        self.permuted = permuted

    def rows(self, count: int, stream: int = 0) -> list[Tensor]:
        random = np.random.default_rng([PLANTED, 1, stream])
        weights = random.uniform(0.5, 1.5, (count, 3 * GROUP)) * (random.uniform(size=(count, 3 * GROUP)) < 1 / 12)
        sites = []
        for directions, scale, mean in zip(self.directions, SCALES, MEANS, strict=True):
            noise = 0.02 * random.standard_normal((count, directions.shape[1]))
            sites.append((weights @ directions + noise) * scale + mean)
            if self.permuted:
                weights = random.permutation(weights)
        return [torch.from_numpy(site).float() for site in sites]

    def source(self, batches: int = 100) -> JoinedSource:
        return JoinedSource([IterableSource(list(site.split(BATCH))) for site in self.rows(batches * BATCH)])

    def found(self, dictionary: Dictionary) -> dict[str, float]:
        """Share of the planted features of each kind that a feature writes where, and only where, they are planted.

        That is with cosines > 0.9 to the directions, at both sites with a share between 0.3 and 0.7 of the decoder
        norms; or at one with a share > 0.9.
        """
        norms = dictionary.site_norms().double()
        share = norms[:, 0] / norms.sum(1)
        cosines = [
            normalize(part.double(), dim=1) @ torch.from_numpy(directions).T
            for part, directions in zip(dictionary.W_dec.split(WIDTHS, dim=1), self.directions, strict=True)
        ]
        is_shared = ((share > 0.3) & (share < 0.7))[:, None]
        hits = {
            "shared": torch.minimum(*cosines).where(is_shared, 0.0)[:, :GROUP],
            "first": cosines[0].where(share[:, None] > 0.9, 0.0)[:, GROUP : 2 * GROUP],
            "second": cosines[1].where(share[:, None] < 0.1, 0.0)[:, 2 * GROUP :],
        }
        return {kind: float((hit.amax(0) > 0.9).double().mean()) for kind, hit in hits.items()}


def shape(architecture: str = "batch_topk", **settings: Any) -> DictionaryConfig:
    return DictionaryConfig.model_validate({"architecture": architecture, "d_sae": 6 * GROUP, "k": 4, **settings})


@pytest.mark.parametrize("architecture", quick_for(["batch_topk"], ["topk", "batch_topk", "jumprelu", "gated"]))
def test_planted_features_are_found_at_their_sites(architecture: str) -> None:
    planted = Planted()
    made = train(planted.source(), shape(architecture), TrainConfig(tokens=1000 * BATCH, batch_size=BATCH))
    assert (made.d_in, made.d_out, made.frame) == (44, 44, Frame(site_widths=WIDTHS))
    found = planted.found(made)
    assert min(found.values()) > 0.9, found
    torch.testing.assert_close(made.site_norms().sum(1), torch.ones(made.d_sae), rtol=1e-5, atol=0)


@pytest.mark.slow
def test_an_l1_penalty_splits_shared_features_in_two() -> None:
    """f_j Σ_s ‖W_dec,s,j‖ is the same for a shared feature and for two exclusive ones in its place: the decoupling of
    Minder et al. 2025, §2. Each planted direction is found at its site, shared or split."""
    planted = Planted()
    made = train(planted.source(), shape("relu"), TrainConfig(tokens=1000 * BATCH, batch_size=BATCH))
    found = planted.found(made)
    assert found["first"] > 0.9 and found["second"] > 0.9
    assert found["shared"] < 0.9
    for part, directions in zip(made.W_dec.split(WIDTHS, dim=1), planted.directions, strict=True):
        cosines = normalize(part.double(), dim=1) @ torch.from_numpy(directions[:GROUP]).T
        assert float((cosines.amax(0) > 0.9).double().mean()) > 0.9


def test_nothing_shared_is_found_if_rows_do_not_belong_together() -> None:
    """The null: the second site's rows are permuted, which leaves all statistics of a single site as they are."""
    planted = Planted(permuted=True)
    made = train(planted.source(), shape(), TrainConfig(tokens=1000 * BATCH, batch_size=BATCH))
    assert planted.found(made)["shared"] == 0


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scales_of_sites_are_folded_exactly(architecture: str, center: bool) -> None:
    """In float64: every site has its width as variance, raw rows fire the same features, and their reconstructions are
    those of normalised rows, in the units of each site."""
    source = Planted().source(8)
    normalise, _ = normalisations_of(source, None, center, torch.device("cpu"))
    assert isinstance(normalise.scale, Tensor)
    raw = torch.cat(Planted().rows(8 * BATCH), dim=1).double()
    x = (raw - normalise.mean) * normalise.scale
    for part in x.split(WIDTHS, dim=1):
        variance = float((part - part.mean(0)).square().sum(1).mean())
        assert variance == pytest.approx(part.shape[1], rel=1e-5)
    dictionary = random_weights(build(shape(architecture), sum(WIDTHS), site_widths=WIDTHS).double())
    features, reconstruction = dictionary.encode(x), dictionary(x)
    assert 0 < float((features > 0).double().mean()) < 0.9
    fold_(dictionary, normalise, None)
    torch.testing.assert_close(dictionary(raw), reconstruction / normalise.scale + normalise.mean, rtol=1e-9, atol=1e-6)
    ratio = dictionary.encode(raw)[features > 1e-6] / features[features > 1e-6]
    unit = normalise.scale.double().log().mean().exp()
    torch.testing.assert_close(ratio, (1 / unit).expand_as(ratio), rtol=1e-5, atol=0)
    fold_(dictionary, normalise.inverse(), None)
    torch.testing.assert_close(dictionary(x), reconstruction, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dictionary.encode(x), features, rtol=1e-5, atol=1e-5)


def random_weights(dictionary: Dictionary) -> Dictionary:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in dictionary.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(drawn.abs() if name == "threshold" else 0.3 * drawn)
    return dictionary


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_resumed_training_is_the_uninterrupted_one(architecture: str, tmp_path: Path) -> None:
    """Bit for bit, from step 20 of 40, with dead features and all that a checkpoint holds."""
    settings = TrainConfig(
        tokens=40 * BATCH, batch_size=BATCH, checkpoint_every=20, keep_checkpoints=9, log_every=10,
        dead_after_tokens=4 * BATCH,
    )  # fmt: skip
    whole = train(Planted().source(8), shape(architecture), settings, folder=tmp_path)
    saved = sae.load(tmp_path / "checkpoints" / "step-00000040")
    (tmp_path / "checkpoints" / "step-00000040" / "state.pt").unlink()
    resumed = train(Planted().source(8), shape(architecture), settings, folder=tmp_path)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [10, 20, 30, 40]
    for (name, ours), theirs, third in zip(
        resumed.named_parameters(), whole.parameters(), saved.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs) and torch.equal(ours, third), name
    assert saved.frame == whole.frame == Frame(site_widths=WIDTHS)
    assert torch.equal(saved.site_norms(), whole.site_norms())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_starts_from_a_crosscoder(architecture: str) -> None:
    """One step with a rate of almost 0 gives back the function that it started from."""
    source = Planted().source(8)
    start = train(source, shape(architecture), TrainConfig(tokens=8 * BATCH, batch_size=BATCH))
    made = train(source, shape(architecture), TrainConfig(tokens=BATCH, batch_size=BATCH, lr=1e-12), start=start)
    rows = torch.cat(Planted().rows(64, stream=2), dim=1)
    if "threshold" in dict(start.named_parameters()) and architecture != "jumprelu":
        made.get_parameter("threshold").copy_(start.get_parameter("threshold"))  # training sets it anew
    torch.testing.assert_close(made(rows), start(rows), rtol=1e-4, atol=1e-2)
    with pytest.raises(
        ConfigError, match=r"is a crosscoder of sites with \[24, 20\] numbers, the new one has one site"
    ):
        train(
            IterableSource(list(torch.cat(Planted().rows(8 * BATCH), dim=1).split(BATCH))), shape(architecture),
            TrainConfig(tokens=BATCH, batch_size=BATCH), start=start,
        )  # fmt: skip


def test_a_pass_reads_each_part_once_for_all_dictionaries() -> None:
    """A crosscoder and SAEs of its sites, together: each as it is when trained alone."""
    settings = TrainConfig(tokens=8 * BATCH, batch_size=BATCH)
    joined = Planted().source(8)
    first, second = joined.parts
    recipes = {name: Recipe(shape(), settings, source=name) for name in ("first", "both", "second")}
    together = train_all({"first": first, "second": second, "both": joined}, recipes).dictionaries
    alone = Planted().source(8)
    for name, source in (("first", alone.parts[0]), ("second", alone.parts[1]), ("both", alone)):
        expected = train(source, shape(), settings)
        for (key, ours), theirs in zip(together[name].named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(ours, theirs), (name, key)


def test_a_source_may_stand_for_two_sites() -> None:
    rows = list(Planted().rows(4 * BATCH)[0].split(BATCH))
    part = IterableSource(rows)
    joined = JoinedSource([part, part])
    assert [torch.equal(x, torch.cat([y, y], dim=1)) for x, y in zip(joined, rows, strict=False)] == [True] * 4
    joined.restart()
    made = train(joined, shape(), TrainConfig(tokens=4 * BATCH, batch_size=BATCH))
    expected = train(
        JoinedSource([IterableSource(rows), IterableSource(rows)]),
        shape(),
        TrainConfig(tokens=4 * BATCH, batch_size=BATCH),
    )
    assert torch.equal(made.W_dec, expected.W_dec)


def test_statistics_of_joined_rows_are_those_of_the_rows() -> None:
    sites = Planted().rows(4 * BATCH)
    ours = JoinedSource([IterableSource([site]) for site in sites]).statistics
    rows = torch.cat(sites, dim=1).double()
    torch.testing.assert_close(ours.mean, rows.mean(0), rtol=1e-12, atol=0)
    assert ours.mean_squared_norm == pytest.approx(float(rows.square().sum(1).mean()), rel=1e-12)
    assert ours.variance == pytest.approx(float((rows - rows.mean(0)).square().sum(1).mean()), rel=1e-9)


def test_sources_that_cannot_be_joined_are_refused() -> None:
    long, short = (IterableSource([torch.randn(rows, 3) for _ in range(4)]) for rows in (6, 4))
    with pytest.raises(ConfigError, match="needs at least one source"):
        JoinedSource([])
    with pytest.raises(ConfigError, match=r"the parts have batches of \[4, 6\] rows: make them equal"):
        JoinedSource([long, short])
    with pytest.raises(ConfigError, match="a JoinedSource cannot be part of a joined source: give an ActivationLoader"):
        JoinedSource([JoinedSource([long])])
    target = IterableSource([torch.randn(6, 3) for _ in range(4)])
    with pytest.raises(
        ConfigError, match="a source has 1 sites, but a transcoder reads one and gives one: leave target"
    ):
        train(JoinedSource([long]), shape(), TrainConfig(tokens=6), target=target)
    with pytest.raises(ConfigError, match="only a crosscoder has decoder norms by site"):
        build(shape(), 5).site_norms()
