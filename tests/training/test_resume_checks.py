"""What may differ between a checkpoint and the run that goes on from it."""

import json
from pathlib import Path

import pytest
from helpers import captured_log, tiny_model_config, tiny_train_config

from checkpointing import find_checkpoints
from outside_in.data.tokenizer import gpt2
from outside_in.storage import metrics
from outside_in.training import resume_checks

DATA = {"train": "2000 tokens, sha256 aa", "validation": "200 tokens, sha256 bb"}


@pytest.fixture
def saved():
    """A snapshot as it comes back from a checkpoint's JSON."""
    return json.loads(json.dumps(resume_checks.snapshot(tiny_model_config(), tiny_train_config(), DATA, gpt2())))


def check(saved, model=None, train=None, *, accept=False, overrides=()):
    with captured_log() as messages:
        resume_checks.check_configs(
            saved,
            tiny_model_config(**model or {}),
            tiny_train_config(**train or {}),
            accept=accept,
            overrides=dict(overrides),
        )
    return messages


def test_nothing_changed_is_nothing_to_say(saved):
    assert check(saved) == []
    resume_checks.check_data(saved, DATA, accept=False)


@pytest.mark.parametrize("bad", [None, 7, "text", [1]])
@pytest.mark.parametrize("name", ["model_config", "train_config", "data", "versions", "seconds_trained"])
def test_a_meta_without_what_going_on_takes_is_refused_by_the_name_of_it(saved, name, bad):
    meta = saved | {"seconds_trained": 1.5}
    resume_checks.check_form(meta, Path("meta.json"))
    with pytest.raises(ValueError, match=f"^meta.json: lacks a usable '{name}'"):
        resume_checks.check_form(meta | {name: bad}, Path("meta.json"))
    with pytest.raises(ValueError, match=name):
        resume_checks.check_form({key: value for key, value in meta.items() if key != name}, Path("meta.json"))


def test_data_that_the_checkpoint_says_nothing_of_are_other_data(saved):
    with pytest.raises(ValueError, match="the train tokens differ from the checkpoint's: None → 2000"):
        resume_checks.check_data(saved | {"data": {}}, DATA, accept=True)


@pytest.mark.parametrize("accept", [False, True])
@pytest.mark.parametrize(
    ("model", "train", "change"),
    [
        ({"emb_dim": 64}, {}, "emb_dim: 32 → 64"),
        ({"tied_head": True}, {}, "tied_head: false → true"),
        ({}, {"seed": 43}, "seed: 42 → 43"),
        ({}, {"microbatch_size": 3}, "microbatch_size: 2 → 3"),
        ({}, {"microbatches_per_call": 2}, "microbatches_per_call: null → 2"),
        ({}, {"objective": "a-to-a"}, 'objective: "next-token" → "a-to-a"'),
    ],
)
def test_a_fatal_change_is_refused_with_old_and_new_value_whatever_is_accepted(saved, model, train, change, accept):
    with pytest.raises(ValueError) as caught:
        check(saved, model, train, accept=accept)
    assert str(caught.value).startswith(f"{change}: this cannot change within a run")


def test_all_fatal_changes_are_named_at_once(saved):
    with pytest.raises(ValueError, match="n_layers: 1 → 3; seed: 42 → 2: "):
        check(saved, {"n_layers": 3}, {"seed": 2, "learning_rate": 0.5})


@pytest.mark.parametrize(
    ("train", "change"),
    [
        ({"learning_rate": 0.02}, "learning_rate: 0.01 → 0.02"),
        ({"precision": "bfloat16"}, 'precision: "float32" → "bfloat16"'),
        ({"drop_rate": 0.5}, "drop_rate: 0.0 → 0.5"),
    ],
)
def test_an_announced_change_needs_to_be_accepted(saved, train, change):
    with pytest.raises(ValueError) as caught:
        check(saved, train=train)
    assert str(caught.value).startswith(change)
    assert "--accept-changes" in str(caught.value)
    assert check(saved, train=train, accept=True) == [f"since the checkpoint: {change}"]


def test_a_free_change_is_only_reported(saved):
    assert check(saved, train={"checkpoint_interval": 7}) == ["since the checkpoint: checkpoint_interval: 5 → 7"]
    [line] = check(saved, train={"mesh": {"data": 4}})
    assert line.endswith('→ {"data": 4, "fsdp": 1}')


def test_an_override_is_accepted_for_its_own_key_alone(saved):
    changes = {"learning_rate": 0.02, "drop_rate": 0.5}
    with pytest.raises(ValueError, match=r"^drop_rate: 0.0 → 0.5: undo it, or resume with --accept-changes"):
        check(saved, train=changes, overrides={"learning_rate": 0.02})
    lines = check(saved, train=changes, overrides={"learning_rate": 0.02}, accept=True)
    assert lines == [
        "since the checkpoint: learning_rate: 0.01 → 0.02 (on the command line)",
        "since the checkpoint: drop_rate: 0.0 → 0.5",
    ]


def test_no_override_accepts_a_fatal_change(saved):
    with pytest.raises(ValueError, match=r"seed: 42 → 43.*: this cannot change within a run"):
        check(saved, train={"seed": 43}, overrides={"seed": 43}, accept=True)


def test_a_change_back_from_an_override_is_said_to_be_one(saved):
    saved["train_config"] |= {"learning_rate": 0.02, "mesh": {"data": 1, "fsdp": 2}}
    saved["overrides"] = {"learning_rate": 0.02, "mesh.fsdp": 2}
    change = "learning_rate: 0.02 → 0.01 (the last start had learning_rate=0.02 on its command line)"
    with pytest.raises(ValueError) as caught:
        check(saved)
    assert str(caught.value) == f"{change}: repeat learning_rate=0.02, or resume with --accept-changes"
    lines = check(saved, accept=True)
    assert lines[0] == f"since the checkpoint: {change}"
    assert lines[1].endswith('"fsdp": 1} (the last start had mesh.fsdp=2 on its command line)')
    with pytest.raises(ValueError, match=r"beta2.*undo it, or resume with --accept-changes"):
        check(saved, train={"beta2": 0.5})


def test_overrides_that_are_no_object_are_refused(saved):
    with pytest.raises(ValueError, match=r"^meta.json: lacks a usable 'overrides'"):
        resume_checks.check_form(saved | {"seconds_trained": 1.5, "overrides": [1]}, Path("meta.json"))


def test_the_same_loggers_are_no_change(saved):
    saved["train_config"]["log_to"] = ["wandb"]
    assert check(saved, train={"log_to": ["wandb"]}) == []


def test_another_version_is_reported(saved):
    saved["versions"]["jax"] = "0.1.2"
    del saved["versions"]["optax"]
    lines = check(saved)
    assert len(lines) == 2
    assert lines[0].startswith("since the checkpoint: jax 0.1.2 → ")
    assert lines[1].startswith("since the checkpoint: optax None → ")


@pytest.mark.parametrize("name", ["python", "jax", "flax", "optax", "orbax-checkpoint"])
def test_the_versions_are_those_that_a_repetition_depends_on(saved, name):
    assert saved["versions"][name][0].isdigit()


def test_another_kind_of_device_is_reported(saved):
    saved["versions"]["device"] = "NVIDIA H200"
    assert check(saved) == ["since the checkpoint: device NVIDIA H200 → cpu; expect tiny differences"]


def test_a_key_that_came_after_the_checkpoint_is_no_change(saved):
    del saved["train_config"]["epochs"], saved["model_config"]["tied_head"]
    assert check(saved) == []


@pytest.mark.parametrize(("train", "spare"), [("1921 tokens, sha256 aa", 0), ("1985 tokens, sha256 aa", 4)])
def test_a_run_goes_on_drawing_from_the_sequences_it_began_with(train, spare):
    assert resume_checks.num_spare({"data": {"train": train}}, num_sequences=120, length=16) == spare


@pytest.mark.parametrize("accept", [False, True])
@pytest.mark.parametrize("old", ["1999 tokens, sha256 cc", None])
def test_other_training_tokens_are_refused_whatever_is_accepted(saved, old, accept):
    saved["data"]["train"] = old
    with pytest.raises(ValueError, match=f"train tokens differ from the checkpoint's: {old} → 2000 tokens.*new run"):
        resume_checks.check_data(saved, DATA, accept=accept)


@pytest.mark.parametrize("new", ["1999 tokens, sha256 cc", None])
def test_other_validation_tokens_need_to_be_accepted(saved, new):
    with pytest.raises(ValueError, match=f"validation tokens .* → {new}; .*--accept-changes"):
        resume_checks.check_data(saved, DATA | {"validation": new}, accept=False)
    resume_checks.check_data(saved, DATA | {"validation": new}, accept=True)


def test_other_tokens_are_told_with_both_revisions_of_a_hub_dataset(saved):
    saved["data"]["revision"] = "aaa"
    with pytest.raises(ValueError, match=r"revisions of the Hub dataset: aaa → bbb"):
        resume_checks.check_data(saved, DATA | {"train": "1 token", "revision": "bbb"}, accept=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedule": "constant"}, "after step 5 is 0.01 now, not 0.00666"),
        ({"schedule": "wsd", "warmup_tokens": 256, "decay_percent": 80}, "after step 5 is 0.008 now, not 0.00666"),
        ({"learning_rate": 0.02}, "after step 5 is 0.0133 now, not 0.00666"),
        ({"beta1": 0.8}, None),
    ],
)
def test_another_schedule_says_what_it_does_to_the_learning_rate(call_program, make_run, changes, said):
    run = make_run()
    call_program("train", run)
    [checkpoint] = [c.path.name for c in find_checkpoints(run / "checkpoints") if c.global_step == 5]
    config = json.loads((run / "train.json").read_text())
    (run / "train.json").write_text(json.dumps(config | changes))
    finished = call_program("train", run, "--from", checkpoint, "--accept-changes")
    assert finished.returncode == 0, finished.stderr
    told = [line for line in finished.stdout.splitlines() if "learning rate after" in line]
    assert len(told) == bool(said) and all(f"by its schedule, the learning rate {said}" in line for line in told)
    if said:
        record = metrics.read(run / "metrics.jsonl")[5]
        assert f"{record['learning_rate']:.3g}" == said.split()[4]
