"""An environment of its own for every toolkit that is compared with, made once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
FOLDER = HERE / "environments"
PACKAGES = {
    "saelens": "sae-lens",
    "dictionary_learning": "dictionary-learning",
    "sparsify": "eai-sparsify",
    "llamascopium": "llamascopium",
}


def python(toolkit: str, folder: Path = FOLDER) -> Path:
    """The Python of a toolkit's environment, with this environment's release of PyTorch; of our own, this one.

    What follows a comma says how the toolkit is used, in the same environment.
    """
    toolkit = toolkit.partition(",")[0]
    if toolkit not in PACKAGES:
        return Path(sys.executable)
    path = folder / toolkit
    if not (path / "installed").is_file():
        print(f"making an environment for {toolkit} (once)", file=sys.stderr)
        release = f"torch=={torch.__version__.partition('+')[0]}"
        subprocess.run([sys.executable, "-m", "venv", path], check=True)
        install = [path / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, release], check=True)
        subprocess.run([*install, "-c", HERE / "constraints.txt", PACKAGES[toolkit], release], check=True)
        # nnsight, which dictionary_learning loads, brings it along; nothing here uses it, and it must fit torch's build
        subprocess.run([*install[:3], "uninstall", "--quiet", "--yes", "torchvision"], check=True)
        (path / "installed").touch()
    return path / "bin" / "python"
