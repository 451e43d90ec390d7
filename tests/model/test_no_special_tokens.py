"""A tokenizer without special tokens: nothing opens a context, nothing stands between documents, and it stays so."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sae.activations import ActivationCache
from sae.activations.harvest import harvest
from sae.config.sources import ModelConfig
from sae.config.splits import HELD_OUT, TRAIN
from sae.errors import ModelError
from sae.model.language_model import LanguageModel
from tests.conftest import make_tiny_config

PADDED = 320


@pytest.fixture(scope="module", params=["exact", "padded"])
def plain(
    request: pytest.FixtureRequest, tiny_model: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model of its folder whose tokenizer has no special token; its embedding may have rows that no token has."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("plain") / "plain"
    bpe = ByteLevelBPETokenizer()
    bpe.train([str(path) for path in sorted(text_folder.iterdir())], vocab_size=300)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer)
    tokenizer.save_pretrained(folder)
    rows = PADDED if request.param == "padded" else len(tokenizer)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=rows, bos_token_id=None)
    config.eos_token_id = None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(plain: Path) -> LanguageModel:
    return LanguageModel(ModelConfig(name=str(plain)))


def test_the_tokenizer_stays_as_loaded(model: LanguageModel, plain: Path) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(plain)
    assert model.tokenizer.get_vocab() == loaded.get_vocab() and len(model.tokenizer) == 300
    assert model.tokenizer.all_special_ids == []
    assert model.bos is None and model.separator is None


def test_a_bos_token_is_refused_and_named(model: LanguageModel, plain: Path, text_folder: Path, tmp_path: Path) -> None:
    config = make_tiny_config(plain, text_folder, tmp_path / "run", {"harvest.hooks": ["blocks.1.hook_resid_pre"]})
    with pytest.raises(ModelError) as caught:
        harvest(config, model)
    assert str(caught.value) == ("model 'plain': its tokenizer has no BOS or EOS token; set data.prepend_bos=false")


def test_documents_follow_each_other_and_no_token_is_made_up(
    model: LanguageModel, plain: Path, text_folder: Path, tmp_path: Path
) -> None:
    overrides = {"harvest.hooks": ["blocks.1.hook_resid_pre"], "data.prepend_bos": False}
    config = make_tiny_config(plain, text_folder, tmp_path / "run", overrides)
    cache: ActivationCache = harvest(config, model)
    assert cache.policy.masked_ids == () and not cache.policy.prepend_bos
    for split in (TRAIN, HELD_OUT):
        batches = list(cache.contexts(split, batch_contexts=4))
        tokens = torch.cat([batch.tokens.flatten() for batch in batches])
        assert int(tokens.max()) < 300
    held_out = {path.name: path.read_text(encoding="utf-8") for path in text_folder.iterdir()}
    names = cache.documents(HELD_OUT)
    text = "".join(held_out[Path(name).name] for name in names)
    assert text.startswith(model.tokenizer.decode(tokens.tolist()))


def test_a_bos_token_that_the_model_has_no_row_for(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    beyond: Any = SimpleNamespace(bos_token_id=999, eos_token_id=None, all_special_ids=[999])
    monkeypatch.setattr(model, "tokenizer", beyond)
    with pytest.raises(ModelError, match=r"has the id 999, and the model has embeddings of 3[02]0 tokens; load"):
        model.token_policy(prepend_bos=True, masked_positions=1, mask_special_tokens=True)
