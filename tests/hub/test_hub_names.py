"""Names of dictionaries on the hub: what they stand for, without a hub."""

from __future__ import annotations

from pathlib import Path

import pytest

import sae
from sae.errors import FormatError
from sae.hub import RELEASES, HubName, list_dictionaries, parse_name
from sae.hub.releases import release_of
from sae.hub.snapshots import Snapshot

JB = "jbloom/GPT2-Small-SAEs-Reformatted"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("org/repo", HubName("org/repo")),
        ("org/repo:a/b", HubName("org/repo", "a/b")),
        ("org/repo@v1.0:a/b/", HubName("org/repo", "a/b", "v1.0")),
        ("org/repo@refs/pr/1", HubName("org/repo", "", "refs/pr/1")),
        ("org/repo:sae_24576:v1", HubName("org/repo", "sae_24576:v1")),
        ("gpt2-small-res-jb/8", HubName(JB, "blocks.8.hook_resid_pre")),
        ("gpt2-small-res-jb@0123abc/8", HubName(JB, "blocks.8.hook_resid_pre", "0123abc")),
        ("gpt2-small-res-jb/11", HubName(JB, "blocks.11.hook_resid_pre")),
        ("gpt2-small-res-jb/blocks.11.hook_resid_post", HubName(JB, "blocks.11.hook_resid_post")),
        ("gpt2-small-res-jb", HubName(JB)),
        (
            "gpt2-small-mlp-tm/11",
            HubName("tommmcgrath/gpt2-small-mlp-out-saes", "sae_group_gpt2_blocks.11.hook_mlp_out_24576:v2"),
        ),
        (
            "gpt2-small-resid-post-v5-32k/3",
            HubName("jbloom/GPT2-Small-OAI-v5-32k-resid-post-SAEs", "v5_32k_layer_3.pt"),
        ),
        ("gpt2-small-mlp-out-v5-128k/3", HubName("jbloom/GPT2-Small-OAI-v5-128k-mlp-out-SAEs", "v5_128k_layer_3")),
        (
            "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71",
            HubName("google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71"),
        ),
        (
            "gemma-scope-2-270m-pt-transcoders-all/layer_0_width_16k_l0_big",
            HubName("google/gemma-scope-2-270m-pt", "transcoder_all/layer_0_width_16k_l0_big"),
        ),
        ("llama_scope_lxr_8x/15", HubName("fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L15R-8x")),
        ("llama_scope_lxm_32x/l31m_32x", HubName("fnlp/Llama3_1-8B-Base-LXM-32x", "Llama3_1-8B-Base-L31M-32x")),
        (
            "qwen-scope-3-8b-base-w64k-l50/layer7.sae.pt",
            HubName("Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50", "layer7.sae.pt"),
        ),
    ],
)  # fmt: skip
def test_names_stand_for_places(name: str, place: HubName) -> None:
    assert parse_name(name) == place


@pytest.mark.parametrize(
    "text", ["runs", "./org/repo", "~/org/repo", "/org/repo", "a/b/c", "org/repo:../x", "a b/c", ""]
)
def test_what_is_no_name(text: str) -> None:
    assert parse_name(text) is None


def test_what_is_on_this_machine_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_name("org/repo") == HubName("org/repo")
    (tmp_path / "org").mkdir()
    assert parse_name("org/repo") is None, "a misspelt folder is not asked for on the hub"
    assert parse_name("org/repo@main") == HubName("org/repo")
    (tmp_path / "org" / "repo@main").mkdir()
    assert parse_name("org/repo@main") is None
    (tmp_path / "gpt2-small-res-jb").mkdir()
    assert parse_name("gpt2-small-res-jb/8") == HubName(JB, "blocks.8.hook_resid_pre")
    (tmp_path / "gpt2-small-res-jb" / "8").mkdir()
    assert parse_name("gpt2-small-res-jb/8") is None


@pytest.mark.parametrize("key", ["12", "blocks.12.hook_resid_pre", "hook_resid_pre"])
def test_a_dictionary_that_a_release_lacks(key: str) -> None:
    with pytest.raises(FormatError) as caught:
        sae.load(f"gpt2-small-res-jb/{key}")
    assert str(caught.value) == (
        f"release 'gpt2-small-res-jb': has no {key!r}; give one of blocks.0.hook_resid_pre, blocks.1.hook_resid_pre, "
        "…, blocks.11.hook_resid_post, or the number of a block ('sae list gpt2-small-res-jb')"
    )


def test_what_is_neither_has_the_way_out() -> None:
    with pytest.raises(FormatError) as caught:
        sae.load("gpt2-small-res-jp")
    text = str(caught.value)
    assert text.startswith(
        "dictionary 'gpt2-small-res-jp': no config.json there; give a dictionary folder or a run fold"
    )
    assert text.endswith("'sae list' shows the releases); did you mean the release 'gpt2-small-res-jb'?")


def test_the_table_is_consistent() -> None:
    """Every dictionary is found again from its repository and path; processing is one that models know."""
    for name, release in RELEASES.items():
        assert release.processing in ("none", "center_and_fold"), name
        assert release.published.keys() <= release.paths.keys(), name
        assert release.scales.keys() in (set(), release.paths.keys()), name
        for id, path in release.paths.items():
            assert release_of(release.repository, path) == (name, id)
            assert parse_name(f"{name}/{id}") == HubName(release.repository, path)
    assert len({(one.repository, one.folder) for one in RELEASES.values()}) == len(RELEASES)


def test_what_is_known_of_gpt2_small_res_jb() -> None:
    """The stream is centred, which the files do not say; SAELens's registry does."""
    commit = "0" * 40
    place = Path(f"/cache/models--jbloom--GPT2-Small-SAEs-Reformatted/snapshots/{commit}/blocks.8.hook_resid_pre")
    source = Snapshot.of(place)
    assert source == Snapshot(JB, commit, "blocks.8.hook_resid_pre")
    origin = source.origin({"model": {"name": "gpt2-small", "revision": "x"}, "hook": "other"})
    assert origin["model"] == {"name": "gpt2", "revision": "x", "weight_processing": "center_and_fold"}
    assert (origin["hook"], origin["context_length"]) == ("blocks.8.hook_resid_pre", 128)
    assert origin["tokens"] == {"prepend_bos": True, "masked_positions": 0, "masked_ids": []}
    split = RELEASES["gpt2-small-res-jb-feature-splitting"]
    assert split.origin("blocks.8.hook_resid_pre_98304")["hook"] == "blocks.8.hook_resid_pre"
    assert Snapshot.of(Path("runs/quickstart/dictionary")) is None


def test_a_release_is_listed_without_a_hub() -> None:
    listing = list_dictionaries("gpt2-small-res-jb")
    eighth, last = listing.entries[8], listing.entries[-1]
    assert (eighth.id, eighth.name) == ("blocks.8.hook_resid_pre", "gpt2-small-res-jb/blocks.8.hook_resid_pre")
    assert (eighth.numbers.l0, eighth.numbers.explained_variance, eighth.source) == (60, 0.9, "SAELens's registry")
    assert (last.id, last.numbers.l0) == ("blocks.11.hook_resid_post", 70)
    assert "weight_processing=center_and_fold" in listing.notes[0]
