"""What a crosscoder's files hold: the widths of its sites, and with them its decoder norms by site."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sae
from sae.dictionary.base import FORMAT, Dictionary
from sae.dictionary.frame import Frame
from sae.errors import FormatError
from sae.files.formats import Format

WIDTHS = (4, 3, 2)


def crosscoder(**metadata: Any) -> Dictionary:
    dictionary = sae.JumpReLU(9, 12, metadata=metadata)
    dictionary.set_frame(Frame(site_widths=WIDTHS))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).abs())
    return dictionary


def test_a_saved_crosscoder_is_loaded_again(tmp_path: Path) -> None:
    dictionary = crosscoder()
    dictionary.save(tmp_path)
    again = sae.load(tmp_path)
    assert again.frame == Frame(site_widths=WIDTHS) and again.is_crosscoder and not again.is_transcoder
    assert again.site_widths == WIDTHS and again.d_out == 9
    x = torch.randn(5, 9)
    assert torch.equal(again(x), dictionary(x))
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["format_version"], config["site_widths"]) == (4, list(WIDTHS))
    with pytest.raises(FormatError, match="version 4 is newer"):
        Format(FORMAT.name, 3).check(config, "dictionary")  # what packages before do
    assert "site_widths=[4, 3, 2]" in repr(again)


def test_norms_by_site_are_in_units_in_which_sites_vary_equally() -> None:
    """Norms of the parts of rows, times the scales of training relative to their geometric mean over the numbers."""
    raw = crosscoder()
    start = 0
    for site, width in enumerate(WIDTHS):
        part = raw.W_dec.detach()[:, start : start + width]
        torch.testing.assert_close(raw.site_norms()[:, site], part.square().sum(1).sqrt())
        start += width
    torch.testing.assert_close(raw.decoder_norms(), raw.site_norms().sum(1))
    scaled = crosscoder(trained={"normalisation_scale": [8.0, 2.0, 0.5]})
    unit = (8.0**4 * 2.0**3 * 0.5**2) ** (1 / 9)
    torch.testing.assert_close(scaled.site_norms(), raw.site_norms() * torch.tensor([8.0, 2.0, 0.5]) / unit)


@pytest.mark.filterwarnings("ignore::sae.files.hashes.UnhashedWarning")
@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ([4, 4], r"site_widths=\[4, 4\]: they add up to 8, and d_in=9"),
        ([9, 0], r"site_widths=\[9, 0\]: expected a list of whole numbers from 1"),
        ("9", "site_widths='9': expected a list of whole numbers from 1"),
    ],
)
def test_widths_that_are_none_are_refused(widths: Any, message: str, tmp_path: Path) -> None:
    crosscoder().save(tmp_path)
    (tmp_path / "SHA256SUMS").unlink()
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "site_widths": widths}))
    with pytest.raises(FormatError, match=message):
        sae.load(tmp_path)


@pytest.mark.parametrize("name", ["saelens", "dictionary_learning"])
def test_formats_of_other_toolkits_have_no_place_for_it(name: str, tmp_path: Path) -> None:
    crosscoder().save(tmp_path / "own")
    with pytest.raises(FormatError, match=r"has no place for site_widths=\[4, 3, 2\]"):
        sae.convert(tmp_path / "own", tmp_path / "other", to=name)
