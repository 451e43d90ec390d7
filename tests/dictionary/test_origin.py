"""A dictionary trained in Python knows where it comes from, and is refused where it does not belong."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sae
from sae.activations import ActivationCache
from sae.activations.harvest import harvest
from sae.config.settings import FeaturesConfig
from sae.config.sources import ModelConfig
from sae.dictionary.origin import Origin, Place, check_belongs
from sae.dictionary.sites import Sites
from sae.errors import CacheError, ConfigError, ModelError, SaeError
from sae.features import collect
from sae.model import language_model as language_model_module
from sae.model.language_model import LanguageModel
from sae.training.source import metadata_of

READS, GIVES = "blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out"
SHAPE, SETTINGS = sae.DictionaryConfig(d_sae=48, k=4), sae.TrainConfig(tokens=640)


@pytest.fixture
def cache(tiny_cache: ActivationCache) -> ActivationCache:
    return tiny_cache


def loader(cache: ActivationCache, hook: str) -> sae.ActivationLoader:
    return sae.ActivationLoader(cache, hook, batch_size=64)


@pytest.fixture
def dictionary(cache: ActivationCache) -> sae.Dictionary:
    return sae.train(loader(cache, READS), SHAPE, SETTINGS)


def test_a_loader_tells_what_is_trained_on_it(cache: ActivationCache, dictionary: sae.Dictionary) -> None:
    for key, value in sae.dictionary_metadata(cache, READS).items():
        assert dictionary.metadata[key] == value
    assert dictionary.metadata["reads"] == dictionary.metadata["gives"] == [{"hook": READS, "width": 32}]
    assert dictionary.metadata["model"]["name"] == "tiny"
    assert dictionary.cfg.hook_layer == 1
    assert dictionary.cfg.model_name == "tiny"


def test_what_the_user_says_wins(cache: ActivationCache) -> None:
    said = {"hook": "elsewhere", "note": "mine"}
    dictionary = sae.train(loader(cache, READS), SHAPE, SETTINGS, metadata=said)
    assert dictionary.origin.reads == dictionary.origin.gives == Sites.one("elsewhere")
    assert (dictionary.metadata["note"], dictionary.metadata["model"]["name"]) == ("mine", "tiny")
    assert "hook" not in dictionary.metadata


def test_a_transcoder_s_loaders_tell_both_hook_points(cache: ActivationCache, language_model: LanguageModel) -> None:
    source, target = loader(cache, READS), loader(cache, GIVES)
    recipe = sae.Recipe(SHAPE, SETTINGS, source="in", target="out")
    transcoder = sae.train_all({"in": source, "out": target}, {"t": recipe}).dictionaries["t"]
    expected = sae.dictionary_metadata(cache, READS, GIVES)
    assert {key: transcoder.metadata.get(key) for key in expected} == expected
    with sae.splice(language_model, transcoder):
        pass
    report = sae.evaluate(transcoder, cache, hook=GIVES)
    assert report.hook == GIVES
    with pytest.raises(ConfigError, match=f"hook '{READS}': the dictionary gives activations of '{GIVES}'"):
        sae.evaluate(transcoder, cache, hook=READS)


def test_a_target_that_the_model_computes_before_the_input_is_refused(cache: ActivationCache) -> None:
    with pytest.raises(ConfigError, match=f"target hook '{READS}' comes before '{GIVES}', which the transcoder reads"):
        sae.train(loader(cache, GIVES), SHAPE, SETTINGS, target=loader(cache, READS))


def test_an_input_of_one_text_has_no_target_of_another(
    tiny_config: Any, language_model: LanguageModel, tmp_path: Path
) -> None:
    """Every token counts, so that the order of tokens is the same in both."""
    settings = {"harvest__hooks": [READS, GIVES], "harvest__masked_positions": 0, "harvest__mask_special_tokens": False}
    one, other = (
        harvest(
            tiny_config(data__holdout_seed=seed, harvest__cache=str(tmp_path / f"cache{seed}"), **settings),
            language_model,
        )
        for seed in (0, 3)
    )
    assert loader(one, READS).token_order == loader(other, GIVES).token_order
    transcoder = sae.train(loader(one, READS), SHAPE, SETTINGS, target=loader(one, GIVES))
    assert transcoder.origin.gives.hook == GIVES
    with pytest.raises(
        ConfigError, match=r"the target's cache, '.*cache3', has other text than the input's, '.*cache0'"
    ):
        sae.train(loader(one, READS), SHAPE, SETTINGS, target=loader(other, GIVES))


def test_of_a_target_that_nobody_knows_nothing_is_said(cache: ActivationCache) -> None:
    """It would pass for a dictionary of the hook point that it reads."""
    unknown = sae.IterableSource([torch.randn(64, 32) for _ in range(2)])
    assert metadata_of(loader(cache, READS), unknown) == {}
    assert metadata_of(unknown, loader(cache, GIVES)) == {}
    assert metadata_of(unknown, None) == {}


def test_it_is_spliced_without_being_told_where(dictionary: sae.Dictionary, language_model: LanguageModel) -> None:
    tokens = torch.tensor([[language_model.bos, *language_model.tokenizer("the river keeps a stone")["input_ids"]]])
    with sae.splice(language_model, dictionary):
        found = language_model.logits(tokens)
    with sae.splice(language_model, dictionary, hook=READS):
        torch.testing.assert_close(language_model.logits(tokens), found, rtol=0, atol=0)
    assert (found - language_model.logits(tokens)).abs().max() > 1e-4


Use = Callable[[sae.Dictionary, ActivationCache, LanguageModel, str, Path], Any]
USES: dict[str, Use] = {
    "evaluate": lambda d, cache, model, hook, path: sae.evaluate(d, cache, hook=hook),
    "compare": lambda d, cache, model, hook, path: sae.compare({"one": d, "two": d}, cache, hook=hook),
    "effects": lambda d, cache, model, hook, path: sae.measure_effects(d, cache, model, hook=hook),
    "features": lambda d, cache, model, hook, path: collect(
        d, cache, path / "store", FeaturesConfig(), hook=hook, tokenizer=model.tokenizer
    ),
}


@pytest.mark.parametrize("use", USES)
def test_a_wrong_hook_point_or_model_is_refused(
    use: str, dictionary: sae.Dictionary, cache: ActivationCache, language_model: LanguageModel, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"hook '{GIVES}': the dictionary was trained on '{READS}'; use it there"):
        USES[use](dictionary, cache, language_model, GIVES, tmp_path)
    model = {**dictionary.metadata["model"], "name": "other", "weights_sha256": "0" * 64}
    stranger = sae.train(loader(cache, READS), SHAPE, SETTINGS, metadata={"model": model})
    with pytest.raises(CacheError, match=r"not the dictionary's model: weights_sha256 .* on 'other'; use"):
        USES[use](stranger, cache, language_model, READS, tmp_path)
    assert not (tmp_path / "store").exists()


def test_a_dictionary_of_another_model_is_not_spliced(
    dictionary: sae.Dictionary, cache: ActivationCache, language_model: LanguageModel
) -> None:
    model = {**dictionary.metadata["model"], "weight_processing": "fold_ln"}
    stranger = sae.train(loader(cache, READS), SHAPE, SETTINGS, metadata={"model": model})
    with (
        pytest.raises(ModelError, match="weight_processing is 'none' there and 'fold_ln' in training"),
        sae.splice(language_model, stranger),
    ):
        pass


def with_config(tiny_model: Path, folder: Path, **changes: Any) -> LanguageModel:
    """The tiny model's weights with another `config.json`; None: without that entry."""
    shutil.copytree(tiny_model, folder)
    config = {**json.loads((folder / "config.json").read_bytes()), **changes}
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")
    return LanguageModel(folder)


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_the_same_weights_in_another_number_type_are_the_same_model(
    stored: str, language_model: LanguageModel, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "stored"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: x.to(getattr(torch, stored)) for name, x in weights.items()}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    loaded = {dtype: LanguageModel(ModelConfig(name=str(folder), dtype=dtype)) for dtype in ("float32", "bfloat16")}  # type: ignore[arg-type]
    assert len({model.info.weights_sha256 for model in loaded.values()}) == 2
    tokens = language_model.to_tokens("a text of some words")
    for trained_in, used_in in itertools.permutations(loaded):
        dictionary = sae.TopK(32, 64, k=4)
        dictionary.metadata = {"hook": READS, "model": loaded[trained_in].info.to_json()}
        with contextlib.ExitStack() as stack:
            if stored == "float32" and used_in == "bfloat16":  # rounded: they cannot be compared
                told = f"weights are {used_in} there and were {trained_in} in training, .* in {trained_in} "
                stack.enter_context(pytest.raises(ModelError, match=told))
            with torch.no_grad(), sae.splice(loaded[used_in], dictionary):
                assert loaded[used_in].logits(tokens).isfinite().all()
    stranger = {**loaded["float32"].info.to_json(), "weights_sha256": "0" * 64}
    with pytest.raises(ModelError, match="not the dictionary's model: weights_sha256"):
        check_belongs(Origin.of({"hook": READS, "model": stranger}), loaded["bfloat16"].as_place)


@pytest.mark.parametrize("change", [{"n_head": 4}, {"activation_function": "relu"}, {"layer_norm_epsilon": 0.1}])
def test_the_same_weights_in_another_configuration_are_another_model(
    change: dict[str, Any], dictionary: sae.Dictionary, tiny_model: Path, tmp_path: Path
) -> None:
    other = with_config(tiny_model, tmp_path / "other", **change)
    assert other.info.weights_sha256 == dictionary.metadata["model"]["weights_sha256"]
    told = (
        r"model 'other': not the dictionary's model: config_sha256 is .* with the same weights; .*, or delete config_s"
    )
    with pytest.raises(ModelError, match=told), sae.splice(other, dictionary):
        pass
    dictionary.metadata["model"] = {**dictionary.metadata["model"], "config_sha256": None}
    with sae.splice(other, dictionary):
        pass


def test_what_is_not_computed_with_does_not_make_another_model(
    dictionary: sae.Dictionary, tiny_model: Path, tmp_path: Path
) -> None:
    changes = {
        "_name_or_path": "elsewhere/tiny", "transformers_version": "4.0.0", "use_cache": False, "dtype": None,
        "torch_dtype": "bfloat16", "architectures": ["Other"], "pad_token_id": 3, "output_hidden_states": True,
        "attn_implementation": "eager", "resid_pdrop": 0.1,
    }  # fmt: skip
    with sae.splice(with_config(tiny_model, tmp_path / "copy", **changes), dictionary):
        pass


RECORDS: dict[str, tuple[dict[str, Any], bool]] = {
    "of another configuration": ({"config_sha256": "0" * 64}, True),
    "by another version of the library": ({"config_sha256": "0" * 64, "library": "transformers 4.0.0"}, False),
    "by a version that knew no configurations": ({"config_sha256": None, "library": None}, False),
    "of a model with code of its own": ({"code_sha256": "0" * 64}, False),  # which the library has by now
}


@pytest.mark.parametrize("record", RECORDS)
def test_configurations_are_compared_where_both_are_known(
    record: str, cache: ActivationCache, language_model: LanguageModel, tmp_path: Path
) -> None:
    changes, refused = RECORDS[record]
    model = {**sae.dictionary_metadata(cache, READS)["model"], **changes}
    made = sae.train(loader(cache, READS), SHAPE, SETTINGS, metadata={"model": model})
    expected = pytest.raises(SaeError, match="config_sha256 is") if refused else contextlib.nullcontext()
    for use in USES.values():
        with expected:
            use(made, cache, language_model, READS, tmp_path)
    with expected, sae.splice(language_model, made):
        pass


def test_code_of_the_model_s_own_is_compared_where_both_have_some(dictionary: sae.Dictionary) -> None:
    place = Place("there", {**dictionary.metadata["model"], "code_sha256": "1" * 64}, ModelError)
    check_belongs(dictionary.origin, place)
    dictionary.metadata["model"] = {**dictionary.metadata["model"], "code_sha256": "2" * 64}
    with pytest.raises(
        ModelError, match=r"there: not the dictionary's model: code_sha256 is '1+' there and '2+' in training"
    ):
        check_belongs(dictionary.origin, place)


def test_a_language_model_is_named_or_configured(language_model: LanguageModel, tiny_model: Path) -> None:
    for name in (str(tiny_model), tiny_model):
        assert sae.LanguageModel(name).info == language_model.info
    for wrong in (7, None, {"name": "gpt2"}, ["gpt2"]):
        with pytest.raises(SaeError, match=r"language model .*: expected a name such as 'gpt2', or a sae.ModelConfig"):
            language_model_module._configured(wrong)  # the constructor's first line
