"""Configuration: YAML and overrides, and what a wrong one is told."""

from __future__ import annotations

import copy
import errno
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from pydantic import ValidationError

from sae.config.file import describe_keys, load_config, parse_config, shipped_configs
from sae.config.settings import DictionaryConfig, RunConfig, TrainConfig
from sae.errors import ConfigError
from sae.files.writing import write_bytes
from sae.training.recipe import setting_of

ROOT = Path(__file__).parents[2]


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    return str(caught.value)


def test_overrides_win_over_the_file_and_are_yaml(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("dictionary: {k: 8, d_sae: 100}\nharvest: {hooks: [blocks.0.hook_resid_pre]}\n")
    config = load_config(
        tmp_path / "c.yaml",
        ["dictionary.k=16", "harvest.hooks=[blocks.1.hook_mlp_out]", "train.lr=1e-3", "train.tokens=null"],
    )
    assert (config.dictionary.k, config.dictionary.d_sae) == (16, 100)
    assert config.harvest.hooks == ("blocks.1.hook_mlp_out",)
    assert config.hook == "blocks.1.hook_mlp_out"
    assert config.train.lr == 1e-3
    assert config.train.tokens is None


def test_numbers_in_scientific_notation_without_a_point_are_numbers() -> None:
    """YAML 1.1 reads 1e-3 as a string; a user means a number."""
    assert load_config(None, ["train.lr=1e-3"]).train.lr == 0.001


@pytest.mark.parametrize("text", ["2024-11-23", "001", "runs/a #1", "1e5", "yes", "[", "a: b", "null"])
def test_text_is_taken_as_it_stands(text: str) -> None:
    """YAML would make dates, numbers, booleans and comments of these."""
    assert load_config(None, [f"out={text}"]).out == text
    revision = load_config(None, [f"model.revision={text}"]).model.revision
    assert revision == (None if text == "null" else text)


def test_text_in_a_file_that_yaml_takes_for_something_else_wants_quotes(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("out: 2024-11-23\n")
    with pytest.raises(ConfigError, match=r"^setting out=.*: input should be a valid string; put it in quotes$"):
        load_config(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("out: '2024-11-23'\nmodel: {revision: 1e5}\n")
    config = load_config(tmp_path / "c.yaml")
    assert (config.out, config.model.revision) == ("2024-11-23", "1e5")


def test_an_optional_text_can_be_taken_back(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("wandb: {project: p}\n")
    for nothing in ("null", ""):
        assert load_config(tmp_path / "c.yaml", [f"wandb.project={nothing}"]).wandb.project is None


@pytest.mark.parametrize(("text", "number"), [("1e8", 10**8), ("300e6", 3 * 10**8), ("1.5e+6", 1_500_000)])
def test_whole_numbers_may_be_in_scientific_notation(tmp_path: Path, text: str, number: int) -> None:
    (tmp_path / "c.yaml").write_text(f"train: {{tokens: {text}}}\ndata: {{tokens: {text}}}\n")
    for config in (
        load_config(tmp_path / "c.yaml"),
        load_config(None, [f"train.tokens={text}", f"data.tokens={text}"]),
    ):
        assert (config.train.tokens, config.data.tokens) == (number, number)
        assert isinstance(config.data.tokens, int)
    assert "setting seed=0.15: input should be a valid integer" in refusal("seed=1.5e-1")


def test_one_hook_needs_no_list(tmp_path: Path) -> None:
    hook = "blocks.1.hook_resid_pre"
    (tmp_path / "c.yaml").write_text(f"harvest: {{hooks: {hook}}}\n")
    assert load_config(tmp_path / "c.yaml").harvest.hooks == (hook,)
    assert load_config(None, [f"harvest.hooks={hook}"]).harvest.hooks == (hook,)


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "c.yaml") == RunConfig()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(batch=3), "unknown setting 'batch': did you mean batch_size?"),
        (lambda: TrainConfig(zzzz=3), "unknown setting 'zzzz': TrainConfig.model_fields lists every key"),
        (lambda: DictionaryConfig(d_sae="many"), "setting d_sae='many': input should be a valid integer"),
        (lambda: RunConfig(dictionary={"kk": 4}), "unknown setting 'dictionary.kk': did you mean dictionary.k?"),
        (lambda: TrainConfig(products="float32"), "setting 'train.products' is called 'train.encoder_dtype' now"),
    ],
)
def test_wrong_settings_in_python_give_the_same_errors(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value).startswith(message)


def test_settings_survive_copies_and_pickles() -> None:
    config = RunConfig(train=TrainConfig(lr=1e-3), seed=3)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config.model_copy() == config
    assert RunConfig.model_validate(config.model_dump()) == config


def test_the_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError):
        RunConfig().seed = 3


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("dictionary.kk=3", "unknown setting 'dictionary.kk': did you mean dictionary.k?"),
        ("k=3", "unknown setting 'k': did you mean dictionary.k?"),
        ("train.lerning_rate=1", "unknown setting 'train.lerning_rate'"),
        ("train.batchsize=1", "unknown setting 'train.batchsize': did you mean train.batch_size?"),
        ("modle.name=x", "unknown setting 'modle'"),
        ("zzzz=1", "unknown setting 'zzzz': 'sae train --help' lists every key"),
    ],
)
def test_unknown_keys_are_refused_and_the_nearest_is_named(override: str, hint: str) -> None:
    assert refusal(override).startswith(hint)


def test_values_that_do_not_fit_are_refused() -> None:
    assert refusal("dictionary.k=-1") == "setting dictionary.k=-1: input should be greater than 0"
    assert "train.tokens='many'" in refusal("train.tokens=many")
    assert "harvest.dtype='float8'" in refusal("harvest.dtype=float8")
    assert "'float32', 'float16', 'bfloat16' or 'int8'" in refusal("harvest.dtype=float8")
    assert "override 'train={lr: 1, lr: 2}': 'lr' is repeated" in refusal("train={lr: 1, lr: 2}")
    assert refusal("dictionary.k").startswith("override 'dictionary.k': expected key=value")
    assert "not a YAML value" in refusal("seed=[")
    assert refusal("out=") == "setting out=None: input should be a valid string"
    assert refusal("seed.x=1", "seed=3", "seed.x=1").startswith("override seed.x: seed is a value, not a section")


@pytest.mark.parametrize(
    "key",
    ["seed", "train.shuffle_seed", "data.holdout_seed", "train.log_every", "evaluation.tokens", "train.snapshots"],
)
def test_numbers_that_could_not_be_read_again_are_refused(key: str) -> None:
    load_config(None, [f"{key}={2**63 - 1}"])
    assert refusal(f"{key}={2**63}").endswith(": expected at most 9,223,372,036,854,775,807")
    assert f"setting {key}" in refusal(f"{key}=1e30")


def test_a_seed_of_the_held_out_text_may_be_below_zero() -> None:
    assert load_config(None, [f"data.holdout_seed={-(2**63)}"]).data.holdout_seed == -(2**63)
    assert "expected at least -9,223" in refusal(f"data.holdout_seed={-(2**63) - 1}")


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1.5", "true"])
def test_numbers_of_tokens_are_whole(value: str) -> None:
    assert "expected a number 0 or more, or auto" in refusal(f"evaluation.legacy_tokens={value}")
    assert load_config(None, ["evaluation.legacy_tokens=1e3"]).evaluation.legacy_tokens == 1000


def test_settings_that_contradict_each_other_are_refused() -> None:
    message = "dictionary.k=5000 exceeds dictionary.d_sae=4096: lower k or raise d_sae"
    assert refusal("dictionary.k=5000") == message
    assert "is not harvested; harvest.hooks has blocks.2.hook_resid_pre" in refusal(
        "dictionary.reads=blocks.0.hook_mlp_out"
    )
    repeated = "harvest.hooks=[blocks.0.hook_mlp_out, blocks.0.hook_mlp_out]"
    assert "names blocks.0.hook_mlp_out more than once" in refusal(repeated)
    assert "exceed 1" in refusal("train.warmup_fraction=0.9", "train.decay_fraction=0.2")


def test_files_that_are_no_configuration_are_refused(tmp_path: Path) -> None:
    def of_file(content: bytes) -> str:
        (tmp_path / "c.yaml").write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            load_config(tmp_path / "c.yaml")
        return str(caught.value)

    assert "expected keys and values" in of_file(b"- a\n- b\n")
    assert "not YAML" in of_file(b"a: [1\n")
    assert "'k' is repeated" in of_file(b"dictionary:\n  k: 4\n  d_sae: 64\n  k: 8\n")
    assert "unknown setting 'c.x'" not in of_file(b"a: &a {x: 1}\nd:\n  b: &b {<<: *a, x: 2}\nc: {<<: *b}\n")
    assert "'train' is repeated" in of_file(b"train: {lr: 1}\ntrain: {l1_coefficient: 1}\n")
    assert "cannot be read" in of_file(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"config .*nothing\.yaml': no such file"):
        load_config(tmp_path / "nothing.yaml")


def test_a_shipped_configuration_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = {path.stem: path for path in (Path(__file__).parents[2] / "configs").iterdir()}
    assert shipped_configs() == files and len(files) == 4
    for name, path in files.items():
        assert load_config(name) == load_config(f"{name}.yaml") == load_config(Path(name)) == load_config(path)
    assert load_config("quickstart", ["train.lr=1e-3"]).train.lr == 1e-3
    assert load_config("quickstart").folder == Path("runs/quickstart"), "relative to the current folder"


def test_the_users_files_come_before_shipped_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart.yaml").write_text("seed: 1")
    assert load_config("quickstart").seed == load_config("quickstart.yaml").seed == 1
    Path("quickstart").write_text("seed: 2")
    assert (load_config("quickstart").seed, load_config("quickstart.yaml").seed) == (2, 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quikstart", "no such file; did you mean 'quickstart'? sae comes with gpt2-small, local-model, quickstart, "),
        ("gpt2-smal.yaml", "no such file; did you mean 'gpt2-small'? sae comes with gpt2-small, "),
        ("zzz", "no such file; sae comes with gpt2-small, local-model, quickstart, sweep"),
        ("configs/quickstart.yaml", "no such file; 'quickstart' is the configuration that comes with sae"),
        ("configs/zzz.yaml", "no such file"),
    ],
)
def test_an_unknown_configuration_is_refused_with_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config(name)
    assert str(caught.value).startswith(f"config {name!r}: {message}")
    assert str(caught.value) == f"config {name!r}: {message}" or message.endswith(", ")


@pytest.mark.parametrize("kind", ["folder", "FIFO", "large", "unreadable", "of a run"])
def test_a_file_of_the_users_is_never_to_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    path = tmp_path / "mine"
    expected = {
        "folder": f"name the YAML file, such as {str(path / 'config.yaml')!r}",
        "unreadable": "cannot be read (Permission denied); check permissions and free memory, and run the same command",
        "of a run": "to write it again after deleting it",
    }.get(kind, "give a YAML file that can be read")
    if kind == "folder":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "of a run":
        path = path / "config.yaml"
        write_bytes(path, b"seed: 1")
        path.write_bytes(b"seed: 2")
    else:
        path.write_bytes(b"#" * (2_000_000 if kind == "large" else 2))
    if kind == "unreadable":
        refused = OSError(errno.EACCES, os.strerror(errno.EACCES))
        monkeypatch.setattr(os, "open", mock.Mock(side_effect=refused))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    monkeypatch.undo()
    assert str(caught.value).startswith(f"config {str(path)!r}: ") and expected in str(caught.value)
    assert ("delet" in str(caught.value)) == (kind == "of a run")


def test_a_written_configuration_reads_back_the_same() -> None:
    config = load_config(None, ["train.lr=0.1", "harvest.hooks=[blocks.0.hook_resid_pre]"])
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configurations_are_valid(path: Path) -> None:
    load_config(path)


def test_every_key_is_described() -> None:
    keys = list(describe_keys())
    assert len(keys) > 40
    assert all(len(text) >= 10 for _, _, text in keys), [key for key, _, text in keys if len(text) < 10]


def test_an_old_key_is_refused_with_the_new_one_and_read_where_the_toolkit_wrote_it(tmp_path: Path) -> None:
    old = "train:\n  products: bfloat16\n"
    mine = tmp_path / "mine.yaml"
    mine.write_text(old)
    for read in (lambda: load_config(mine), lambda: load_config(None, ["train.products=float32"])):
        with pytest.raises(ConfigError, match=r"'train\.products' is called 'train\.encoder_dtype' now"):
            read()
    record = tmp_path / "run" / "config.yaml"
    (record.parent / "dictionary").mkdir(parents=True)
    record.write_text(old)
    assert load_config(record).train.encoder_dtype == "bfloat16"
    assert setting_of({"products": "bfloat16"}, "encoder_dtype") == "bfloat16"
    assert setting_of({}, "encoder_dtype") == "auto"


def test_an_old_key_in_a_sweep_and_in_python(tmp_path: Path) -> None:
    record = tmp_path / "sweep" / "config.yaml"
    (record.parent / "activations").mkdir(parents=True)
    record.write_text("sweep:\n  train:\n    products: [float32]\n")
    assert load_config(record).sweep == {"train": {"encoder_dtype": ["float32"]}}
    with pytest.raises(ConfigError, match=r"'train\.products' is called 'train\.encoder_dtype' now"):
        TrainConfig.model_validate({"products": "float32"})


def test_text_in_double_quotes_has_escapes_on_the_command_line() -> None:
    assert load_config(None, [r'data.column="a\tb"']).data.column == "a\tb"
    assert load_config(None, ["data.column='a'"]).data.column == "'a'"
