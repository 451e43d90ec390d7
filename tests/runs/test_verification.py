"""`sae verify` looks at everything that a run folder is made of, wherever it lies."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sae.runs.run import Run
from sae.runs.verification import record_hashes, verify
from tests.conftest import Command, make_tiny_config


@pytest.fixture(scope="module")
def trained(tiny_model: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with cache and dictionary. Read only."""
    config = make_tiny_config(tiny_model, text_folder, tmp_path_factory.mktemp("verified") / "run", {})
    run = Run(config)
    run.harvest()
    run.train()
    return run.folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x40
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("part", "file"),
    [("activations", "blocks.1.hook_resid_pre/train-00000.safetensors"), ("dictionary", "weights.safetensors"),
     ("checkpoints", "*/state.pt")],
)  # fmt: skip
def test_a_linked_part_is_checked_as_one_that_is_there(run: Path, tmp_path: Path, part: str, file: str) -> None:
    before = verify(run)
    assert before[1] == []
    moved = Path(shutil.move(run / part, tmp_path / "disk"))
    (run / part).symlink_to(moved)
    assert verify(run) == before
    flip_last_byte(next(moved.glob(file)))
    count, problems = verify(run)
    assert count == before[0] and len(problems) == 1
    assert str(run / part) in problems[0] and file.rpartition("/")[2] in problems[0]


def test_a_linked_part_has_hashes_added(run: Path, tmp_path: Path) -> None:
    moved = Path(shutil.move(run / "dictionary", tmp_path / "disk"))
    (run / "dictionary").symlink_to(moved)
    (moved / "SHA256SUMS").unlink()
    assert {path.name for path in record_hashes(run)} == {"config.json", "weights.safetensors"}


def test_linked_runs_are_checked_and_other_links_are_not(run: Path, tmp_path: Path) -> None:
    whole = tmp_path / "runs"
    (whole / "first").mkdir(parents=True)
    (whole / "linked").symlink_to(run)
    (whole / "again").symlink_to(run)
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "cache").symlink_to(run / "activations")
    (whole / "others").symlink_to(tmp_path / "others")
    assert verify(whole) == verify(run)


def test_links_that_lead_in_circles_or_nowhere(run: Path) -> None:
    before = verify(run)
    for name in ("features", "probing"):
        (run / name).symlink_to(run)
    assert verify(run) == before
    (run / "features").unlink()
    (run / "features").symlink_to("/no/such/disk")
    count, [problem] = verify(run)
    assert count == before[0]
    assert problem == (
        f"{str(run / 'features')!r}: leads to '/no/such/disk', which is not a folder; attach that disk or restore it, "
        "or delete the link"
    )


def test_the_cache_that_a_run_names_is_checked(
    tiny_model: Path, text_folder: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    config = make_tiny_config(tiny_model, text_folder, tmp_path / "run", {"harvest.cache": str(cache)})
    run = Run(config)
    files = len(run.harvest().manifest.files) + 1  # and the manifest
    before = verify(run.folder)
    assert before == (files + 1, [])  # config.yaml
    assert verify(tmp_path) == before, "once"
    flip_last_byte(next(cache.glob("tokens/*")))
    assert len(verify(run.folder)[1]) == 1
    assert command("verify", run.folder).status == 1
    shutil.rmtree(cache)
    said: list[str] = []

    class Told:
        def __call__(self, stage: str, done: int, total: int) -> None: ...
        def beside(self, stage: str, text: str) -> None: ...
        def announce(self, text: str) -> None:
            said.append(text)

    assert verify(run.folder, Told()) == (1, [])
    assert said == [f"{str(run.folder)!r}: its cache {str(cache)!r} does not exist, and was not checked"]


def test_progress_counts_files(run: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    count, _ = verify(run, lambda *call: calls.append(call))
    assert calls == [("verify", done, count) for done in range(count + 1)]
