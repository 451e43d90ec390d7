"""No warnings of libraries' progress bars."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys, types, warnings
sys.modules["ipywidgets"] = None
sys.modules["ipykernel.zmqshell"] = types.ModuleType("ipykernel.zmqshell")
shell = type("ZMQInteractiveShell", (), {})()
sys.modules["IPython"] = types.ModuleType("IPython")
sys.modules["IPython"].get_ipython = lambda: shell
sys.modules["IPython.display"] = types.ModuleType("IPython.display")
for name in ("HTML", "display"):
    setattr(sys.modules["IPython.display"], name, None)
warnings.simplefilter("always")
BEFORE
import tqdm.auto
print(tqdm.auto.tqdm.__mro__[1].__module__)
"""


@pytest.mark.parametrize(
    ("before", "warned"),
    [("from sae.config.progress import import_tqdm; import_tqdm()", False), ("", True)],
    ids=["as the toolkit does", "as libraries do"],
)
def test_a_notebook_without_widgets_gives_no_warning(before: str, warned: bool) -> None:
    command = [sys.executable, "-c", CODE.replace("BEFORE", before)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ("IProgress not found" in done.stderr) is warned, done.stderr
    assert warned or done.stdout.startswith("tqdm."), "bars are text"
