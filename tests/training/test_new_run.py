import json

import pytest
from helpers import TINY_MODEL, TINY_TRAIN, complaint, random_tokens
from safetensors.numpy import save_file


@pytest.fixture
def new(call_program, make_run, tmp_path):
    """Make `new` from a tiny run with these arguments; return how the program ended, and the two files."""
    like = make_run("like")

    def make(*changes):
        finished = call_program("train", "--new", tmp_path / "new", "--like", like, *changes)
        files = [tmp_path / "new" / name for name in ("model.json", "train.json")]
        return finished, *(json.loads(path.read_text()) if path.exists() else None for path in files)

    return make


def make_data(folder, tokens, tokenizer=None, validation=1000):
    folder.mkdir()
    for split, count in (("train", tokens), ("validation", validation)):
        if count:
            save_file({"tokens": random_tokens(count)}, folder / f"{split}.safetensors")
    if tokenizer:
        (folder / "data.json").write_text(json.dumps({"tokenizer": tokenizer}))
    return folder


def test_a_new_run_is_like_the_old_one_but_for_what_is_changed(new, call_program, tmp_path, token_folder):
    finished, model, train = new("learning_rate=1e-3", "model.n_layers=2", "mesh.fsdp=1", "sample_prompt=Once upon")
    assert finished.returncode == 0, finished.stderr
    assert model == TINY_MODEL | {"n_layers": 2}
    expected = {"learning_rate": 1e-3, "mesh": TINY_TRAIN["mesh"] | {"fsdp": 1}, "sample_prompt": "Once upon"}
    assert train == TINY_TRAIN | {"dataset": str(token_folder)} | expected
    assert f"train it: uv run train.py {tmp_path / 'new'}" in finished.stdout
    assert call_program("train", tmp_path / "new", "--check").returncode == 0


def test_no_run_is_made_within_another_or_like_a_folder_of_runs(call_program, make_run, tmp_path):
    like, inside = make_run("like"), tmp_path / "like" / "a" / "new"
    told = complaint(call_program("train", "--new", inside, "--like", like))
    assert f"{inside}: {like} is a run, so nothing in it would be trained; choose another folder" in told
    told = complaint(call_program("train", "--new", tmp_path / "new", "--like", tmp_path))
    assert f"{tmp_path}: is a folder of runs; name one of them for --like, such as {like}" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["like", "tokens"]


@pytest.mark.parametrize("options", [["--check"], ["--max-layers", 2], ["--from", "best"]])
def test_options_of_a_run_need_one(call_program, options):
    assert "expected a run, or a folder of runs, before the options" in complaint(call_program("train", *options))


def test_few_data_are_trained_on_in_several_epochs_and_bring_their_vocabulary(new, tmp_path):
    per_step = TINY_TRAIN["microbatch_size"] * TINY_TRAIN["gradient_accumulation_steps"] * TINY_MODEL["context_length"]
    few = make_data(tmp_path / "few", 3 * per_step + 1, "gpt2")
    finished, model, train = new(f"dataset={few}", "start_val_token=1")
    steps = -(-TINY_TRAIN["min_train_tokens"] // per_step)
    assert model["vocab_size"] == 50257
    assert (train["min_train_tokens"], train["epochs"], train["start_val_token"]) == (-1, round(steps / 3), 1)
    assert f"model.vocab_size=50257, min_train_tokens=-1, epochs={train['epochs']}" in finished.stdout


@pytest.mark.parametrize("missing", [0, 1])
def test_whole_steps_are_what_must_fit(new, tmp_path, missing):
    needed = TINY_TRAIN["min_train_tokens"] + 1  # a target after the last token
    data = make_data(tmp_path / "data", needed - missing)
    _, _, train = new(f"dataset={data}")
    assert train["min_train_tokens"] == (-1 if missing else TINY_TRAIN["min_train_tokens"])


def test_the_mesh_can_be_given_whole_or_by_its_axes(new):
    _, _, train = new("mesh=3", "mesh.fsdp=1")
    assert train["mesh"] == {"fsdp": 1}


def test_enough_data_change_nothing_else(new, tmp_path):
    many = make_data(tmp_path / "many", TINY_TRAIN["min_train_tokens"] + 1)
    _, model, train = new(f"dataset={many}")
    assert (model, train) == (TINY_MODEL, TINY_TRAIN | {"dataset": str(many)})


def test_keys_that_are_given_are_not_adapted(new, tmp_path):
    few = make_data(tmp_path / "few", 1000, "gpt2")
    _, model, train = new(f"dataset={few}", "epochs=7", "model.vocab_size=50304")
    assert (model["vocab_size"], train["epochs"], train["min_train_tokens"]) == (
        50304,
        7,
        TINY_TRAIN["min_train_tokens"],
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["learning_rat=1"], "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        (["model.n_heads=5"], "is not divisible by n_heads=5"),
        (["learning_rate=fast"], "learning_rate: expected a number such as 0.001"),
        (["learning_rate"], "learning_rate: expected KEY=VALUE"),
        (["=1"], "=1: expected KEY=VALUE"),
        (["learning_rate=1", "learning_rate=2"], "learning_rate: expected once, got it twice"),
        (["dataset=nowhere"], "no folder 'nowhere'"),
        (["learning_rate=NaN"], "NaN"),
    ],
)
def test_a_change_that_makes_no_valid_run_writes_nothing(new, tmp_path, changes, message):
    finished, *files = new(*changes)
    assert message in complaint(finished)
    assert files == [None, None] and not (tmp_path / "new").exists()


def test_data_too_few_for_a_step_are_refused(new, tmp_path):
    finished, *_ = new(f"dataset={make_data(tmp_path / 'few', 5)}")
    assert "5 training tokens, but one global step takes" in complaint(finished)


def test_validation_data_too_few_for_a_batch_are_refused_unless_it_is_left_out(new, tmp_path):
    needed = TINY_TRAIN["microbatch_size"] * TINY_MODEL["context_length"]
    data = make_data(tmp_path / "few", 10_000, validation=needed)
    finished, *_ = new(f"dataset={data}")
    assert f"{needed} validation tokens, but a batch takes {needed} and a target" in complaint(finished)
    finished, _, train = new(f"dataset={data}", "val_tokens=0")
    assert finished.returncode == 0 and train["val_tokens"] == 0


def test_data_without_validation_make_a_run_without(new, tmp_path):
    finished, _, train = new(f"dataset={make_data(tmp_path / 'none', 10_000, validation=0)}")
    assert train["val_tokens"] == 0 and "val_tokens=0" in finished.stdout


def test_what_exists_is_not_touched(new, tmp_path):
    (tmp_path / "new").mkdir()
    assert "already exists; choose another name for --new" in complaint(new()[0])
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    "arguments",
    [["--new", "a"], ["--like", "a"], ["--new", "a", "--like", "nowhere"], ["--new", "a", "--like", "b", "--check"]],
)
def test_a_new_run_needs_one_to_be_like(call_program, arguments):
    assert "expected" in complaint(call_program("train", *arguments))
