"""Roads from hook points to logits for tiny models of many families."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import READ, REFUSED, SHORT_ROAD, WHOLE_ROAD, family_row, family_rows, table, write_model
from family_configs import FAMILIES

from sae.config.sources import ModelConfig
from sae.model.language_model import LanguageModel

FEW = ["bloom", "mamba", "llama", "gptj", "gemma3_text"]


@pytest.mark.parametrize("family", FEW)
def test_replacements_are_exact(family: str, tmp_path: Path) -> None:
    """And the logits are those of the model without transformer-lens."""
    from transformers import AutoModelForCausalLM

    row = family_row(family, tmp_path / family, blocks=(2,))
    assert row.failure is None
    assert {"hook_resid_pre", "hook_resid_post"} <= row.cells.keys()
    assert set(row.cells.values()) <= {SHORT_ROAD, READ}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / family, dtype=torch.float32).eval()
    model = LanguageModel(ModelConfig(name=str(tmp_path / family)))
    tokens = model.probe_tokens(2, 20)
    with torch.no_grad():
        expected = plain(tokens).logits
    for hook in ("blocks.2.hook_resid_pre", "blocks.2.hook_resid_post"):
        logits = next(model.replaced_logits(tokens, hook, [torch.clone]))
        torch.testing.assert_close(logits, model.logits(tokens), rtol=0, atol=0)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_the_table_names_roads_and_reasons(tmp_path: Path) -> None:
    text = table([family_row("bloom", tmp_path / "bloom", blocks=(2,))])
    lines = text.splitlines()
    assert lines[0].startswith("| family | `hook_resid_pre` | `ln1.hook_in` |")
    assert lines[2].startswith("| bloom | s | s | r |")


@pytest.mark.slow
def test_forty_families_and_at_most_four_refusals() -> None:
    rows = list(family_rows(FAMILIES))
    print(table(rows))
    used = [row for row in rows if row.failure is None]
    assert len(used) >= 40
    assert {"bloom", "mamba", "mamba2", "gptj", "falcon", "gemma3_text", "gpt_oss", "qwen3_moe"} <= {
        row.family for row in used
    }
    cells = [cell for row in used for cell in row.cells.values()]
    assert cells.count(REFUSED) <= 4
    assert cells.count(SHORT_ROAD) > 10 * cells.count(WHOLE_ROAD)


def test_models_are_the_same_every_time(tmp_path: Path) -> None:
    first, second = (LanguageModel(ModelConfig(name=str(write_model("mamba", tmp_path / str(n))))) for n in (1, 2))
    assert first.info.weights_sha256 == second.info.weights_sha256
