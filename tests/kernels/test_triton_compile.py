"""Every launch of the Triton back end compiles for real GPUs, with their shared memory; no GPU is needed for that."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90])
def test_every_launch_compiles_for_real_gpus(capability: int, tmp_path: Path) -> None:
    """Turing to Hopper, with the divisibilities of true launches: without them the product's tile seems to need less.

    On Hopper, three stages of 128 · 64 + 128 · 64 bfloat16 numbers are 98,304 bytes; before it, two are kept.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.compile_kernels", str(capability)]
    done = subprocess.run(
        command, env={**environment, "TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, timeout=900,
        check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    kernels = {line.partition(" ")[0] for line in lines}
    sources = (Path(__file__).parents[2] / "sae" / "kernels" / "triton").glob("*.py")
    assert kernels == {name for path in sources for name in re.findall(r"def (_\w+_kernel)\(", path.read_text())}
    fused = next(line for line in lines if line.startswith("_candidates_kernel {'BLOCK_B': 128"))
    if capability >= 80:
        assert f" {98304 if capability >= 90 else 65536} bytes shared" in fused
    buffered = [line for line in lines if "'GROUPS'" in line or "_append_from_buffer" in line or "_few" in line]
    assert len(buffered) >= 5
    assert all(line.endswith(" 0 bytes of stack") for line in buffered), "a kernel that selects spills"
