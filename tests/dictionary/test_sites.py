"""Sites in order, their JSON, and the origin that holds them; version 1 of an origin is read as the current one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sae
from sae.dictionary.origin import Origin, in_current_form
from sae.dictionary.sites import Site, Sites, check_order
from sae.errors import ConfigError, FormatError

RESID, MLP, LATER = "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_pre"
BASE, TUNED = {"name": "base", "weights_sha256": "a"}, {"name": "tuned", "weights_sha256": "b"}
CROSSCODER = Sites((Site(RESID, 3), Site(LATER, 2), Site(RESID, 4, "tuned")))


def test_a_row_is_divided_among_its_sites_in_order() -> None:
    rows = torch.arange(18.0).view(2, 9)
    assert CROSSCODER.width == 9
    parts = CROSSCODER.split(rows)
    assert [part.shape[1] for part in parts] == [3, 2, 4]
    assert torch.equal(torch.cat(parts, dim=1), rows)


def test_widths_that_are_unknown_are_not_guessed() -> None:
    partly = Sites((Site(RESID, 3), Site(LATER)))
    assert partly.width is None
    assert partly.of_width(7) == partly
    with pytest.raises(ConfigError, match="widths are unknown"):
        partly.split(torch.zeros(2, 5))
    assert Sites.one(RESID).of_width(7).width == 7
    assert Sites.one(RESID, 7) == Sites.one(RESID)


def test_only_a_single_site_is_a_hook_point() -> None:
    assert Sites.one(RESID).hook == RESID
    assert Sites.one(None).hook is None
    with pytest.raises(ConfigError, match=f"hook points '{RESID}', '{LATER}', tuned:{RESID}: only dict"):
        _ = CROSSCODER.hook


def test_sites_survive_json() -> None:
    record = json.loads(json.dumps(CROSSCODER.to_json()))
    again = Sites.from_json(record)
    assert again == CROSSCODER
    assert [site.width for site in again] == [3, 2, 4]
    assert Sites.one(RESID, 3).to_json() == [{"hook": RESID, "width": 3}]


@pytest.mark.parametrize(
    "record",
    [[], [{"hook": 7}], [{"hook": RESID, "width": "3"}], [{"hook": RESID, "width": True}], [{"model": None}], 7],
)
def test_a_record_of_another_form_is_refused(record: Any) -> None:
    with pytest.raises(ConfigError, match="metadata has reads or gives of another form"):
        Origin.of({"origin_version": 2, "reads": record})


def test_the_model_computes_what_is_read_before_what_is_given() -> None:
    check_order(Sites((Site(RESID), Site(LATER))), Sites((Site(RESID), Site(LATER))))
    check_order(Sites.one(RESID), Sites((Site(MLP), Site(LATER))))
    check_order(Sites.one(LATER), Sites.one(RESID, model="tuned"))
    with pytest.raises(ConfigError, match=f"'{RESID}' comes before '{MLP}', which the transcoder reads"):
        check_order(Sites.one(MLP), Sites((Site(LATER), Site(RESID))))


VERSION_1: dict[str, tuple[dict[str, Any], Origin]] = {
    "an SAE": ({"hook": RESID, "model": BASE}, Origin(Sites.one(RESID), Sites.one(RESID), {"": BASE})),
    "a transcoder": (
        {"hook": RESID, "target_hook": MLP, "activations": "r", "target_activations": "m"},
        Origin(Sites.one(RESID), Sites.one(MLP), activations="r", target_activations="m"),
    ),
    "a transcoder between models": (
        {"hook": RESID, "target_hook": RESID, "model": BASE, "target_model": TUNED},
        Origin(Sites.one(RESID), Sites.one(RESID, model="target"), {"": BASE, "target": TUNED}),
    ),
    "nothing known": ({"note": "mine"}, Origin(Sites.one(None), Sites.one(None))),
}


@pytest.mark.parametrize("case", VERSION_1)
def test_version_1_is_read_as_the_current_one(case: str) -> None:
    metadata, origin = VERSION_1[case]
    assert Origin.of(metadata) == origin
    current = in_current_form({**metadata, "note": "mine"})
    assert current["origin_version"] == 2
    assert current["note"] == "mine"
    assert not current.keys() & {"hook", "target_hook", "target_model"}
    assert Origin.of(json.loads(json.dumps(current))) == origin


def test_a_user_s_own_entries_of_the_same_names_are_left_alone() -> None:
    metadata = {"hook": RESID, "reads": "paper X", "gives": 3, "models": ["a"]}
    assert Origin.of(metadata) == Origin(Sites.one(RESID), Sites.one(RESID))
    dictionary = sae.TopK(6, 12, k=2, metadata={"origin_version": 2, "reads": 3})
    with pytest.raises(sae.errors.ShapeError, match=r"this dictionary takes \[..., 6\]; give it those"):
        dictionary(torch.zeros(2, 5))


def test_a_transcoder_s_origin_is_that_of_both_sides() -> None:
    source = Origin(Sites.one(RESID, 3), Sites.one(RESID, 3), {"": BASE}, activations="r")
    target = Origin(Sites.one(MLP, 3), Sites.one(MLP, 3), {"": BASE}, activations="m")
    assert source.giving(target) == Origin(
        Sites.one(RESID), Sites.one(MLP), {"": BASE}, activations="r", target_activations="m"
    )
    other_model = Origin(Sites.one(RESID, 3), Sites.one(RESID, 3), {"": TUNED}, activations="t")
    between = source.giving(other_model)
    assert between.gives == Sites.one(RESID, model="target")
    assert between.models == {"": BASE, "target": TUNED}
    with pytest.raises(ConfigError, match="swap them"):
        target.giving(source)


def test_a_short_form_in_memory_wins_and_its_width_is_the_dictionary_s() -> None:
    dictionary = sae.TopK(6, 12, k=2, metadata=Origin(Sites.one(RESID, 6), Sites.one(RESID, 6)).to_json())
    assert dictionary.origin.reads.hook == RESID
    dictionary.metadata["hook"] = LATER
    origin = dictionary.origin
    assert (origin.reads.hook, origin.gives.hook, origin.reads.width) == (LATER, LATER, 6)


def test_a_dictionary_s_file_of_a_newer_origin_says_so(tmp_path: Path) -> None:
    sae.TopK(6, 12, k=2, metadata={"origin_version": 3, "reads": "another form"}).save(tmp_path)
    with pytest.raises(FormatError, match=r"config.json': metadata has origin_version=3, .* knows 1 to 2: update sae"):
        sae.load(tmp_path)
    sae.TopK(6, 12, k=2, metadata={"origin_version": 2, "reads": []}).save(tmp_path)
    with pytest.raises(FormatError, match="reads or gives of another form: there is no hook point"):
        sae.load(tmp_path)
