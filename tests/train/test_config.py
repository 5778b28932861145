"""The configuration: where values come from, and what is said of those that do not fit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pypar.mesh_shape import parse_mesh
from pypar.optimizers.config import OptimizerConfig
from pypar.settings import check_values, keys_of
from pypar.train.config import RunConfig, all_keys, load_config
from pypar.train.keys import page
from pypar.train.preflight import check
from pypar.train.sections import TrainConfig
from tests import ROOT


def test_file_then_overrides_then_flags(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('name = "mine"\nmesh = "tp=2"\n[optimizer]\nlr = 1e-3\nbeta1 = 0.8\n[train]\nsteps = 7\n')
    config = load_config(file, ["optimizer.lr=3e-4", "train.steps = 8"], {"name": "yours"})
    assert (config.name, config.mesh) == ("yours", "tp=2")
    assert (config.optimizer.lr, config.optimizer.beta1, config.train.steps) == (3e-4, 0.8, 8)
    assert config.train.batch_size == RunConfig().train.batch_size
    assert config.run_directory == Path("runs/yours")


def test_bare_strings_and_toml_values() -> None:
    config = load_config(
        None, ["data.path=some/texts/*.txt", 'train.sample_prompt="a = 1"', "model.tied_embeddings=true"]
    )
    assert config.data.path == "some/texts/*.txt"
    assert config.train.sample_prompt == "a = 1"
    assert config.model.tied_embeddings is True


def test_whole_number_where_a_number_is_due() -> None:
    lr = load_config(None, ["optimizer.lr=1"]).optimizer.lr
    assert lr == 1.0 and isinstance(lr, float)


def test_mesh_as_a_table_and_as_single_keys(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[mesh]\ntp = 2\npp = 3\n")
    assert load_config(file).mesh == "tp=2,pp=3"
    assert load_config(None, ["mesh.cp=2"]).mesh == "cp=2"


def test_resume_is_true_or_a_path() -> None:
    assert load_config(None, ["train.resume=true"]).train.resume == "auto"
    assert load_config(None, ["train.resume=false"]).train.resume == ""
    assert load_config(None, ["train.resume=runs/x"]).train.resume == "runs/x"


def test_round_trip_through_json() -> None:
    config = load_config(None, ["optimizer.lr=0.1", "context.layout=contiguous", "mesh=tp=2"])
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("optimizer.learning_rate", "optimizer.lr"),
        ("train.sequence_lenght", "train.sequence_length"),
        ("num_heads", "model.num_heads"),
        ("trian.steps", "train.steps"),
        ("optimiser.weight_decay", "optimizer.weight_decay"),
        ("nam", "name"),
    ],
)
def test_unknown_key_suggests_the_nearest(key: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{near}'") as refused:
        load_config(None, [f"{key}=1"])
    assert "unknown configuration key" in str(refused.value)


def test_unknown_key_without_a_neighbour_lists_the_section() -> None:
    with pytest.raises(ValueError, match="model has family, vocab_size, num_layers"):
        load_config(None, ["model.zzzzzzz=1"])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.steps=many", "'train.steps' must be a whole number, not 'many'"),
        ("train.steps=1.5", "'train.steps' must be a whole number, not 1.5"),
        ("train.steps=true", "'train.steps' must be a whole number, not True"),
        ("optimizer.lr=.1", "'optimizer.lr' must be a number, not '.1'"),
        ("model.tied_embeddings=1", "'model.tied_embeddings' must be true or false, not 1"),
        ("name=3", "'name' must be text, not 3"),
        ("optimizer=3", "'optimizer' is a section"),
        ("train.steps.x=3", "must be a whole number"),
        ("train.steps", "must look like section.key=value"),
    ],
)
def test_wrong_type(override: str, sentence: str) -> None:
    with pytest.raises(ValueError) as refused:
        load_config(None, [override])
    assert sentence in str(refused.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        load_config(file)
    file.write_text("steps = = 3")
    with pytest.raises(ValueError, match="is not TOML"):
        load_config(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not TOML"):
        load_config(file)


def test_every_key_can_be_set() -> None:
    values = RunConfig().to_dict()
    for key in all_keys():
        section, _, leaf = key.rpartition(".")
        value = (values[section] if section else values)[leaf]
        assert load_config(None, [f"{key}={json.dumps(value)}"]) == RunConfig()


def test_sizes_that_follow_from_others() -> None:
    model = load_config(None, ["model.d_model=96", "model.num_heads=6"]).model
    filled = model.filled(256)
    assert (filled.head_size, filled.vocab_size) == (16, 256)
    with pytest.raises(ValueError, match="must divide by model.num_heads"):
        load_config(None, ["model.d_model=97", "model.num_heads=6"]).model.filled(256)
    with pytest.raises(
        ValueError, match=r"model.vocab_size \(100\) must be at least the tokenizer's \(256\)"
    ):
        load_config(None, ["model.vocab_size=100"]).model.filled(256)


@pytest.mark.parametrize("key", list(keys_of(RunConfig)), ids=lambda key: key.name)
def test_a_key_says_what_it_is_for_and_its_default_keeps_its_rule(key) -> None:
    assert key.rule.help
    key.check(key.default)
    assert key.rule.choices is None or key.default in key.rule.choices_from(key.default)


def test_values_from_python_are_checked_as_those_of_a_file() -> None:
    check_values(RunConfig())
    for config, sentence in (
        (RunConfig(optimizer=OptimizerConfig(lr="high")), "'optimizer.lr' must be a number, not 'high'"),
        (RunConfig(optimizer=OptimizerConfig(beta1=1.0)), "must be at least 0 and less than 1"),
        (RunConfig(train=TrainConfig(sample_prompt="\udcff")), "train.sample_prompt must be text in UTF-8"),
        (RunConfig(name=" "), "name must not be empty"),
    ):
        with pytest.raises(ValueError) as refused:
            check_values(config)
        assert sentence in str(refused.value)


def test_a_whole_number_that_no_float_holds() -> None:
    check_values(load_config(None, [f"train.steps={10**400}"]))
    with pytest.raises(ValueError, match="'optimizer.lr' must be a number, not 1000"):
        load_config(None, [f"optimizer.lr={10**400}"])


def test_the_page_of_keys_is_that_of_the_code() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == page(), "run `pypar train --keys > docs/configuration.md`"


def test_what_is_wrong_in_a_configuration_is_found_without_torch() -> None:
    code = (
        "import sys; from pypar.cli import main\n"
        "try: main(['train', '--set', 'optimizer.lr=0'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n" and "optimizer.lr (0.0) must be greater than 0" in ended.stderr


def test_a_mesh_is_a_text_or_a_table(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[mesh]\ndp = 4\ntp = "4(row=2,column=2)"\nep = 2\n')
    mesh = parse_mesh(load_config(file).mesh)
    assert mesh == parse_mesh(load_config(None, ["mesh=dp=4,ep=2,tp=4(row=2,column=2)"]).mesh)
    assert mesh.split == {"tp": {"row": 2, "column": 2}} and mesh.grid.size("ep") == 2


@pytest.mark.parametrize(
    ("mesh", "sentence"),
    [
        (
            "dp=2,ep=2",
            "mesh dp=2,ep=2 has an axis 'ep' by ep=2, over which nothing is spread: the roles of a plan are about tp, "
            "cp; leave it out",
        ),
        ("tp=4(row=2,column=2)", "has an axis 'row' by tp=4(row=2,column=2), over which nothing is spread"),
        ("tp=2,ep=2", "ep=2 must divide dp x cp (1), whose ranks it folds; use one of 1"),
    ],
)
def test_a_mesh_has_no_axis_that_changes_nothing(mesh: str, sentence: str) -> None:
    with pytest.raises(ValueError) as refused:
        check(load_config(None, [f"mesh={mesh}"]))
    assert sentence in str(refused.value)
