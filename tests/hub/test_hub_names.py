"""Names of dictionaries on the hub: what they stand for, without a hub."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest

import sae
from sae.errors import DamagedError, FormatError
from sae.hub import RELEASES, HubName, download, list_dictionaries, listing, parse_name
from sae.hub.download import commit_of
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
        ("gpt2-small-res-jb/8/", HubName(JB, "blocks.8.hook_resid_pre")),
        ("gpt2-small-res-jb/", HubName(JB)),
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
    "text",
    [
        "runs",
        "./org/repo",
        "~/org/repo",
        "/org/repo",
        "a/b/c",
        "org/repo:../x",
        "a b/c",
        "",
        "gpt2-small-res-jb@../8",
        "gpt2-small-res-jb@..",
        "gemma-scope-2b-pt-res/../x",
        "gemma-scope-2b-pt-res/a/../../x",
        "qwen-scope/../x",
    ],
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


def test_a_folder_that_hides_a_repository_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    with pytest.raises(FormatError, match=r"; folder 'org' exists here: if you mean the hub's, write 'org/repo@main'$"):
        sae.load("org/repo")
    with pytest.raises(FormatError) as caught:
        sae.load("org/a/b")
    assert "exists here" not in str(caught.value)


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
    assert source is not None
    assert source == Snapshot(JB, commit, "blocks.8.hook_resid_pre")
    origin = source.origin({"model": {"name": "gpt2-small", "revision": "x"}, "hook": "other"})
    assert origin["model"] == {"name": "gpt2", "revision": "x", "weight_processing": "center_and_fold"}
    assert (origin["hook"], origin["context_length"]) == ("blocks.8.hook_resid_pre", 128)
    assert origin["tokens"] == {"prepend_bos": True, "masked_positions": 0, "masked_ids": []}
    split = RELEASES["gpt2-small-res-jb-feature-splitting"]
    assert split.origin("blocks.8.hook_resid_pre_98304")["hook"] == "blocks.8.hook_resid_pre"
    assert Snapshot.of(Path("runs/quickstart/dictionary")) is None
    assert Snapshot.of(place / ".." / ".." / "elsewhere") is None


def test_a_release_is_listed_without_a_hub() -> None:
    listed = list_dictionaries("gpt2-small-res-jb")
    eighth, last = listed.entries[8], listed.entries[-1]
    assert (eighth.id, eighth.name) == ("blocks.8.hook_resid_pre", "gpt2-small-res-jb/blocks.8.hook_resid_pre")
    assert (eighth.numbers.l0, eighth.numbers.variance_explained, eighth.source) == (60, 0.9, "SAELens's registry")
    assert (last.id, last.numbers.l0) == ("blocks.11.hook_resid_post", 70)
    assert "weight_processing=center_and_fold" in listed.notes[0]


def test_a_part_of_a_release_is_listed_by_names_that_load(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "blocks.8.hook_resid_pre"
    files = {f"{path}/cfg.json": 9, f"{path}/sae_weights.safetensors": 9}
    monkeypatch.setattr(listing, "commit_of", lambda place: "0" * 40)
    monkeypatch.setattr(listing, "files_of", lambda place, commit, folder: files)
    monkeypatch.setattr(listing, "fetch", lambda place, commit, files: Path("nowhere"))
    listed = list_dictionaries("gpt2-small-res-jb@v2/8")
    [entry] = listed.entries
    assert parse_name(entry.name) == HubName(JB, path, "v2")
    assert listed.model == "gpt2"
    assert list_dictionaries("gpt2-small-res-jb/").entries[8].name == f"gpt2-small-res-jb/{path}"


def test_a_list_reads_few_small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are counted, large ones are left alone, and one that is damaged or absurd leaves the others."""
    names = [f"{number:03}" for number in range(80)]
    files = {f"{name}/{file}": 9 for name in names for file in ("cfg.json", "config.json", "weights.safetensors")}
    files["001/cfg.json"] = (1 << 20) + 1
    read: list[str] = []

    def fetch(place: HubName, commit: str, wanted: tuple[str, ...]) -> Path:
        read.extend(wanted)
        if wanted == ("002/cfg.json",):
            raise DamagedError("'002/cfg.json': damaged")
        path = tmp_path / wanted[0]
        path.parent.mkdir(exist_ok=True)
        value = {"000": f"1{'0' * 400}", "003": "NaN"}.get(path.parent.name, "7.5")
        path.write_text(f'{{"metadata": {{"l0": {value}}}}}')
        return tmp_path

    monkeypatch.setattr(listing, "commit_of", lambda place: "0" * 40)
    monkeypatch.setattr(listing, "files_of", lambda place, commit, folder: files)
    monkeypatch.setattr(listing, "fetch", fetch)
    listed = list_dictionaries("org/repo")
    assert len(read) == 64
    assert "001/cfg.json" not in read
    assert [entry.numbers.l0 for entry in listed.entries[:6]] == [None, None, None, None, 7.5, 7.5]
    assert len(listed.entries) == 80
    assert listed.notes == ("Without its numbers: '002/cfg.json': damaged.",)


@pytest.mark.parametrize("file", ["../x/config.json", "/etc/passwd", "a/../../b", "a/./b"])
def test_a_file_outside_of_the_repository_is_not_read(file: str) -> None:
    with pytest.raises(FormatError, match="leads out of the repository"):
        download.fetch(HubName("org/repo"), "0" * 40, (file,))


class Api:
    """The hub's library, which knows one commit."""

    sha: str = "a" * 40

    def __init__(self, **_: object) -> None: ...

    def model_info(self, repository: str, revision: str) -> Api:
        return self


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    return tmp_path / "models--org--repo"


def test_the_cache_s_commit_is_written_if_it_is_another(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, name = cache / "refs" / "main", HubName("org/repo")
    reference.parent.mkdir(parents=True)
    reference.write_text("b" * 40)
    assert commit_of(name) == "a" * 40
    assert reference.read_text() == "a" * 40
    assert list(reference.parent.iterdir()) == [reference]
    before = reference.stat()
    assert commit_of(name) == "a" * 40
    assert reference.stat().st_ino == before.st_ino, "not written again"
    monkeypatch.setattr(Api, "sha", "None")
    with pytest.raises(FormatError, match="the hub gives 'None' where a commit was expected"):
        commit_of(name)
    assert reference.read_text() == "a" * 40


def test_a_cache_that_may_not_be_written_is_read(cache: Path) -> None:
    cache.mkdir()
    (cache / "refs").write_text("")  # no folder can be made there, whoever asks
    assert commit_of(HubName("org/repo")) == "a" * 40


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_is_no_error_of_the_hub(cache: Path, number: int) -> None:
    with pytest.raises(FormatError) as caught, download.hub_errors(HubName("org/repo")):
        raise OSError(number, os.strerror(number))
    text = str(caught.value)
    assert os.strerror(number) in text and str(cache.parent) in text and "HF_HOME" in text
    assert "network" not in text
    with pytest.raises(FormatError, match="cannot be reached"), download.hub_errors(HubName("org/repo")):
        raise ConnectionResetError(errno.ECONNRESET, "reset")


def test_what_gemma_scope_2_lacks() -> None:
    """Names in the registry of sae-lens 6.54.12."""
    of_largest = {name for name in RELEASES if name.startswith("gemma-scope-2-27b-pt-")}
    assert of_largest == {f"gemma-scope-2-27b-pt-{kind}" for kind in ("res", "res-all", "transcoders-all")}
    assert len(RELEASES) == 111


@pytest.mark.parametrize("can_xet", [False, True])
def test_xet_s_files_are_resumed_where_the_library_has_no_xet(
    can_xet: bool, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub import file_download
    from huggingface_hub.utils import _runtime

    etag, asked = "e" * 64, list[tuple[str, int]]()
    facts = SimpleNamespace(etag=etag, size=3 << 20, xet_file_data=object(), location="https://elsewhere/signed")

    def http_get(url: str, stream: IO[bytes], *, resume_size: int, **_: object) -> None:
        asked.append((url, resume_size))
        stream.write(b"more")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, **_: facts)
    monkeypatch.setattr(file_download, "http_get", http_get)
    monkeypatch.setattr(_runtime, "is_xet_available", lambda: can_xet)
    partial = cache / "blobs" / f"{etag}.sae-partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"some")
    download._download_content(HubName("org/repo"), "0" * 40, "weights.safetensors")
    if can_xet:
        assert asked == []
        return
    [(url, resumed)] = asked
    assert url.endswith(f"/org/repo/resolve/{'0' * 40}/weights.safetensors")
    assert resumed == 4
    assert (cache / "blobs" / etag).read_bytes() == b"somemore"
