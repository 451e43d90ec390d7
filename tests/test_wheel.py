"""The wheel: what it contains, and a run from it in an empty folder, with nothing of the checkout on the path."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = [
    "data.tokens=20000", "data.held_out_tokens=2000", "data.context_length=64", "train.tokens=20000",
    "dictionary.d_sae=256", "features.tokens=4000", "evaluation.downstream_tokens=512", "evaluation.tokens=1024",
    "evaluation.legacy_tokens=0", "evaluation.frozen_decoder_tokens=0", "evaluation.baseline_tokens=128",
]  # fmt: skip


def pip(*words: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", ROOT, "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    [path] = folder.glob("sae-*.whl")
    return path


def test_a_wheel_holds_the_package_and_its_configurations(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "sae", "configs"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    expected = {
        f"sae/{name}" if name.startswith("configs/") else name: (ROOT / name).read_bytes()
        for name in listed.stdout.splitlines()
    }
    assert contents == expected
    assert {"sae/__init__.pyi", "sae/py.typed", "sae/demo/model.safetensors", "sae/viewer/page.js"} <= expected.keys()
    assert {"sae/configs/quickstart.yaml", "sae/configs/gpt2-small.yaml"} <= expected.keys()


@pytest.mark.slow
def test_the_quickstart_runs_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    installed, place = tmp_path / "installed", tmp_path / "place"
    place.mkdir()
    pip("install", "--no-deps", "--no-index", "--target", installed, wheel)
    environment = {**os.environ, "PYTHONPATH": str(installed)}

    def call(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            list(map(str, words)), cwd=place, env=environment, capture_output=True, text=True, timeout=600, check=False
        )

    found = call(sys.executable, "-c", "import sae; print(sae.__file__); print(sae.load_config('gpt2-small').out)")
    assert found.stdout.splitlines() == [str(installed / "sae" / "__init__.py"), "runs/gpt2-small-l8"], found.stderr
    done = call(installed / "bin" / "sae", "--quiet", "run", "quickstart", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "256 features in runs/quickstart" in done.stdout
    assert [path.name for path in place.iterdir()] == ["runs"]
    run = place / "runs" / "quickstart"
    names = {"config.yaml", "activations", "dictionary", "metrics.jsonl", "eval.json", "eval.md", "features"}
    assert names <= {path.name for path in run.iterdir()}
    report = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    assert report["model"]["name"] == "demo"
    assert 0 < report["explained_variance"]["value"] < 1
    first_line = (run / "config.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first_line.startswith(f"# sae {report['sae_version']}, torch "), "a wheel has no commit"
    listing = call(installed / "bin" / "sae", "sweep", "swep")
    assert listing.stderr == (
        "Error: config 'swep': no such file; did you mean 'sweep'? sae comes with gpt2-small, local-model, quickstart, "
        "sweep\n"
    )
