"""Collects wheels of other toolkits, and of what they and this package need, for a machine without a network.

    python benchmarks/peers/wheels.py peers

makes `peers/TOOLKIT/*.whl` for each toolkit, and `peers/sae/*.whl` with what this package needs beside the packages
that `benchmarks/gpu.py` lists. Packages that a toolkit imports and no training step calls are left out
(`absent.LEFT_OUT`). Nothing is installed here. `--site` unpacks instead for the Python that runs this, so that
`benchmarks/gpu.py --dry-run --peers peers` can use the folders as they are.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

MODEL = ("beartype==0.23.1", "typeguard==4.6.0", "fancy-einsum==0.0.3", "better-abc==0.0.3")
PYDANTIC = ("pydantic==2.14.3", "pydantic-core==2.50.4", "annotated-types==0.8.0", "typing-inspection")
PARSING = ("simple-parsing==0.1.9", "docstring-parser==0.18.0")
WHEELS = {
    "sae": (*PYDANTIC, *MODEL, "transformer-lens==4.3.0", "datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19"),
    "sparsify": ("eai-sparsify==1.3.3", "natsort==8.4.0", "schedulefree==1.4.1", *PARSING),
    "saelens": ("sae-lens==6.54.12", "transformer-lens==3.9.0", *MODEL, *PARSING),
    "dictionary_learning": ("dictionary-learning==0.1.0",),
    "llamascopium": (
        "llamascopium==2.0.0b34", "transformer-lens==3.9.0", *MODEL, *PYDANTIC, "pydantic-settings", "more-itertools",
        "cattrs",
    ),
}  # fmt: skip
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 17)] + ["manylinux2014_x86_64"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="of the machine that the wheels are for")
    parser.add_argument("--toolkits", nargs="+", choices=WHEELS, default=list(WHEELS))
    parser.add_argument("--site", action="store_true", help="unpack, for this Python")
    arguments = parser.parse_args()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    elsewhere = ["--implementation", "cp", "--python-version", arguments.python]
    elsewhere += [word for platform in PLATFORMS for word in ("--platform", platform)]
    for toolkit in arguments.toolkits:
        target = str(arguments.folder / toolkit)
        if arguments.site:
            command = [*pip, "install", "--no-deps", "--only-binary=:all:", "--no-compile", "--target", target]
        else:
            command = [*pip, "download", "--no-deps", "--only-binary=:all:", *elsewhere, "--dest", target]
        subprocess.run([*command, *WHEELS[toolkit]], check=True)
    files = [path for path in arguments.folder.rglob("*") if path.is_file()]
    print(f"{len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
