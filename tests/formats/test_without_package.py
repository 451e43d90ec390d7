"""The lines of the guide that use a dictionary with PyTorch and safetensors alone, where `sae` cannot be imported."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sae
from sae.architectures import ARCHITECTURES

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "convert.md"
ROWS, D_IN, D_SAE, K = 60, 12, 48, 5
USE = """
from safetensors.torch import save_file
x = load_file("x.safetensors")["x"]
save_file({"codes": encode(x).contiguous(), "reconstruction": decode(encode(x)).contiguous()}, "out.safetensors")
assert sys.modules["sae"] is None
"""


def snippet() -> str:
    section = GUIDE.read_text(encoding="utf-8").partition("## Without this package")[2]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found
    return found[1]


def test_it_is_ten_lines_of_the_two_libraries() -> None:
    lines = [line for line in snippet().splitlines() if line and not line.startswith(("import", "from"))]
    assert len(lines) <= 11
    assert set(re.findall(r"^(?:import|from) (\w+)", snippet(), re.MULTILINE)) == {
        "json", "pathlib", "torch", "safetensors",
    }  # fmt: skip


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"gated"}))
def test_codes_and_reconstructions_are_ours(architecture: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(sum(architecture.encode()))
    cls = ARCHITECTURES[architecture]
    dictionary = cls(D_IN, D_SAE, **({"k": K} if "k" in cls.setting_names else {}))  # type: ignore[call-arg]
    with torch.no_grad():
        for name, parameter in dictionary.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values.abs() if name == "threshold" else values)
    dictionary.save(tmp_path / "runs" / "quickstart" / "dictionary")
    x = torch.randn(ROWS, D_IN, generator=generator)
    from safetensors.torch import load_file, save_file

    save_file({"x": x}, tmp_path / "x.safetensors")
    code = "import sys\nsys.modules['sae'] = None\n" + snippet() + USE
    subprocess.run([sys.executable, "-I", "-W", "error", "-c", code], cwd=tmp_path, check=True, timeout=120)
    theirs, ours = load_file(tmp_path / "out.safetensors"), sae.load(tmp_path / "runs" / "quickstart")
    torch.testing.assert_close(theirs["codes"], ours.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs["reconstruction"], ours(x), rtol=1e-5, atol=1e-4)
    fired = (theirs["codes"] > 0).sum(-1)
    assert fired.max() == K if architecture == "topk" else 0 < fired.float().mean() < D_SAE
