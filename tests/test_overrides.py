"""`KEY=VALUE` on the command line: how it is read, what it may change, and how it is written again."""

import json
import shlex
import sys
from functools import partial
from pathlib import Path

import pytest
from helpers import TINY_TRAIN, complaint

from outside_in import overrides
from outside_in.config import ModelConfig, TrainConfig
from outside_in.reports.key_table import key_table
from outside_in.storage.run_directory import RunDirectory

FATAL = [key for key in TrainConfig.leaves() if TrainConfig.on_resume(overrides.top_key(key)) == "fatal"]
OTHERS = [key for key in TrainConfig.leaves() if key not in FATAL]
VALUES = {  # of every key that may change at a start, one that is not the tiny run's
    **{"dataset": "elsewhere", "min_train_tokens": -1, "learning_rate": 1e-3, "initial_weights": "a.safetensors"},
    **{"sample_prompt": "x = 1, y", "precision": "bfloat16", "weight_decay_on": "matrices", "remat": "blocks"},
    **{"schedule": "linear"},
    **{"log_to": ["wandb"], "mesh.data": -1, "mesh.fsdp": 2, "clipping_max_norm": None, "checkpoint_first_step": True},
}


@pytest.fixture
def train(call_program):
    return partial(call_program, "train")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("learning_rate=1e-3", 1e-3),
        ("min_train_tokens=1e9", 1e9),
        ("shuffle=false", False),
        ("loss_rows_per_chunk=null", None),
        ('mesh={"fsdp": 2}', {"fsdp": 2}),
        ("sample_prompt=Once upon", "Once upon"),
        ("sample_prompt=x = 1", "x = 1"),
        ('sample_prompt="null"', "null"),
        ("sample_prompt=[" + "[" * 100_000, "[" + "[" * 100_000),
        ("dataset=", ""),
        ("model.n_layers=6", 6),
    ],
)
def test_a_value_is_json_or_else_text(argument, value):
    assert overrides.parse([argument]) == {argument.partition("=")[0]: value}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["learning_rate"], "learning_rate: expected KEY=VALUE, such as learning_rate=0.001"),
        (["=1"], "=1: expected KEY=VALUE"),
        (["learning_rat=1"], "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        (["learning-rate=1"], "unknown key 'learning-rate'; did you mean 'learning_rate'?"),
        (["n_layers=1"], "unknown key 'n_layers'; did you mean 'model.n_layers'?"),
        (["model.n_layer=1"], "unknown key 'model.n_layer'; did you mean 'model.n_layers'?"),
        (["fsdp=1"], "unknown key 'fsdp'; did you mean 'mesh.fsdp'?"),
        (["mesh.dat=1"], "unknown key 'mesh.dat'; did you mean 'mesh.data'?"),
        (["zzz=1"], "unknown key 'zzz'; `uv run train.py --help-keys` lists them"),
        (["seed=1", "epochs=2", "seed=1"], "seed: expected once, got it twice; keep one"),
        (["learning_rate=NaN"], "learning_rate: NaN is not JSON"),
        (['mesh={"data": 1, "data": 2}'], "mesh: duplicate key 'data'; keep one"),
    ],
)
def test_what_is_no_change_is_refused_in_one_line(arguments, line):
    with pytest.raises(ValueError) as caught:
        overrides.parse(arguments)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    "value", ["plain", "two words", "null", "1e3", '"quoted"', "NaN", "", "x=1", 0.001, None, True]
)
def test_a_value_that_is_written_again_is_read_as_the_same(value):
    [argument] = shlex.split(shlex.join(overrides.as_arguments({"sample_prompt": value})))
    assert overrides.parse([argument]) == {"sample_prompt": value}


def test_the_command_line_comes_before_the_file_and_the_file_before_the_default(make_run):
    run = RunDirectory(make_run(train={"mesh": {"data": 2}, "epochs": 3, "beta2": 0.5}))
    _, config, lines = overrides.load_run(run, ["epochs=1e1", "mesh.fsdp=4", "learning_rate=1"])
    assert (config.epochs, config.beta2, config.weight_decay, config.learning_rate) == (10, 0.5, 0.01, 1.0)
    assert (config.mesh.data, config.mesh.fsdp) == (2, 4)
    assert lines[0] == f"for this start: epochs=10 ({run.train_config}: 3)"
    assert lines[1] == f"for this start: mesh.fsdp=4 ({run.train_config}: 1)"
    assert overrides.load_run(run, [])[2] == []


@pytest.mark.parametrize("key", OTHERS)
def test_a_key_that_may_change_within_a_run_may_change_at_a_start(make_run, key):
    value = VALUES.get(key, 7 if TrainConfig.leaves()[key].annotation is not float else 0.125)
    run = RunDirectory(make_run(train={"schedule": "wsd", "optimizer": "muon"}))  # which use every key
    _, config, _ = overrides.load_run(run, overrides.as_arguments({key: value}))
    assert overrides.in_effect([key], config) == {key: value}
    assert json.loads(json.dumps(overrides.in_effect([key], config))) == {key: value}


@pytest.mark.parametrize("key", [*FATAL, *(f"model.{key}" for key in ModelConfig.leaves())])
def test_a_key_that_cannot_change_within_a_run_is_refused_with_what_makes_another_one(make_run, key):
    run = make_run()
    with pytest.raises(ValueError) as caught:
        overrides.load_run(RunDirectory(run), ["epochs=2", f"{key}=3"])
    line = f"uv run train.py --new {run}-2 --like {run} epochs=2 {key}=3"
    assert str(caught.value) == f"{key}: cannot change within a run; make a new one: {line}"


def test_a_key_that_stays_as_it_is_is_no_override(make_run):
    run = RunDirectory(make_run(model={"logit_soft_cap": 15.0}, train={"learning_rate": 1.0}))
    model_config, config, lines = overrides.load_run(
        run,
        [
            "seed=42",
            "model.n_layers=1",
            "model.shortcut=true",
            "model.logit_soft_cap=15",
            "learning_rate=1",
            "mesh.fsdp=1",
        ],
    )
    assert (model_config, config) == overrides.load_run(run, [])[:2] and lines == []
    with pytest.raises(ValueError, match=r"model\.shortcut: cannot change within a run"):
        overrides.load_run(run, ["model.shortcut=1"])


def test_a_model_key_that_stays_as_it_is_is_no_obstacle(train, make_run):
    run = make_run()
    for _ in range(2):
        assert train(run, "model.n_layers=1").returncode == 0


def test_the_line_that_makes_another_run_does_when_it_is_typed(train, make_run, tmp_path):
    run = make_run("a run")
    (tmp_path / "a run-2").mkdir()
    line = complaint(train(run, "model.n_layers=2", "sample_prompt=it's 1 = 1")).partition("make a new one: ")[2]
    assert train(*shlex.split(line)[3:]).returncode == 0
    new = RunDirectory(tmp_path / "a run-3")
    assert json.loads(new.model_config.read_text())["n_layers"] == 2
    assert json.loads(new.train_config.read_text())["sample_prompt"] == "it's 1 = 1"


def test_a_run_in_this_folder_gets_another_one_beside_it(make_run, monkeypatch):
    run = make_run()
    monkeypatch.chdir(run)
    with pytest.raises(ValueError, match=f"--new {run}-2 --like . seed=1"):
        overrides.load_run(RunDirectory(run.relative_to(run)), ["seed=1"])


def test_a_value_that_the_run_cannot_take_names_the_file_and_the_line(train, make_run):
    run = make_run()
    start = f"error: {run}/train.json with learning_rate=fast: "
    assert (
        complaint(train(run, "learning_rate=fast"))
        == start + 'learning_rate: expected a number such as 0.001, got "fast"'
    )
    (run / "train.json").write_text(json.dumps(TINY_TRAIN | {"seed": -1}))
    assert complaint(train(run, "learning_rate=fast")).startswith(f"error: {run}/train.json: seed: ")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--learning-rate", "3e-4"], "--learning-rate: keys have no dashes before them; write learning_rate=3e-4"),
        (["--learning_rate=3e-4"], "--learning_rate=3e-4: keys have no dashes before them; write learning_rate=3e-4"),
        (["--sample-prompt", "a b"], "--sample-prompt: keys have no dashes before them; write 'sample_prompt=a b'"),
        (["--n_layers", "--check"], "--n_layers: keys have no dashes before them; write model.n_layers=VALUE"),
        (["--mesh.data=1"], "--mesh.data=1: keys have no dashes before them; write mesh.data=1"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_a_key_with_dashes_is_told_how_it_is_written(train, make_run, arguments, line):
    assert complaint(train(make_run(), *arguments)) == f"error: {line}; see {Path(sys.argv[0]).name} --help"


def test_a_key_is_not_taken_for_the_pattern_of_parameters(train, make_run):
    told = complaint(train(make_run(), "--hash-parameters", "seed=1"))
    assert told == "error: --hash-parameters seed=1: expected a pattern; write keys before the option"


def test_keys_come_after_the_run(train):
    line = "error: learning_rate=1: expected after the run: uv run train.py runs/NAME learning_rate=1"
    assert complaint(train("learning_rate=1", "runs/a")) == line


@pytest.mark.parametrize("arguments", [["--check", "epochs=2"], ["epochs=2", "--check"]])
def test_a_check_is_of_the_run_as_it_would_be_under_the_overrides(train, make_run, arguments):
    finished = train(make_run(), *arguments)
    assert finished.returncode == 0, finished.stderr
    assert "run     24 steps" in finished.stdout and "for this start: epochs=2 (" in finished.stdout


def test_a_check_refuses_what_training_would(train, make_run):
    run = make_run()
    for arguments in (["seed=1"], ["learning_rate=-1"], ["min_train_tokens=1e6"]):
        assert complaint(train(run, "--check", *arguments)) == complaint(train(run, *arguments))


def test_nothing_of_a_folder_is_trained_when_a_key_cannot_change(train, make_run, tmp_path):
    (tmp_path / "folder").mkdir()
    runs = [make_run(f"folder/{name}") for name in ("01", "02")]
    before = {path: path.read_bytes() for run in runs for path in run.iterdir()}
    assert "seed: cannot change within a run" in complaint(train(tmp_path / "folder", "seed=1"))
    assert {path: path.read_bytes() for run in runs for path in run.iterdir()} == before


def test_a_config_is_that_of_the_newest_checkpoint_with_its_overrides(make_run):
    run = RunDirectory(make_run())
    _, config, _ = overrides.load_run(run, [])
    meta = {"overrides": {"mesh.fsdp": 2, "epochs": 3}}
    trained = overrides.as_trained(run, config, meta)
    assert (trained.epochs, trained.mesh.fsdp, trained.mesh.data) == (3, 2, 1)
    assert overrides.as_trained(run, config, {}) == config
    for damaged in ([1], None, {"epochs": "x"}, {"zzz": 1}, {"mesh.fsdp": -1}):
        with pytest.raises(ValueError, match=r"train.json with the overrides of its newest checkpoint: "):
            overrides.as_trained(run, config, {"overrides": damaged})


def test_the_table_of_keys_has_every_key_with_type_default_limits_class_and_meaning(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = key_table()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    for config_class, prefix in ((ModelConfig, "model."), (TrainConfig, "")):
        for name, field in config_class.leaves().items():
            default = "required" if field.is_required() else json.dumps(field.default)
            assert f" {prefix}{name} {field.json_schema_extra['on_resume']} {default} " in text
            assert field.description and f" {field.description} " in text
    for entry in (
        "model.vocab_size fatal required integer >= 2, <= 65,536 ",
        "learning_rate announced required number > 0, <= 1,000 ",
        'precision announced "float32" "float32" | "bfloat16" ',
        "clipping_max_norm announced 3.5 number > 0 | null ",
        "keep_checkpoints free 3 integer >= 1, <= 1e15 | null ",
        "seed fatal 42 integer >= 0, < 2,147,483,648 ",
        "shuffle fatal true true | false ",
        "dataset free required text (not empty) ",
        'log_to free [] list of "tensorboard" | "trackio" | "wandb" ',
    ):
        assert f" {entry}" in text
