"""What looks on while a run trains: hashes, updates that change nothing, rejected updates and their descriptions."""

import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import CONTEXT_LENGTH, TINY_MODEL, complaint, random_tokens
from safetensors.numpy import save_file

from checkpointing import find_checkpoints
from model import GPTModel
from outside_in import train_step
from outside_in.diagnostics.parameters import parameter_hashes
from outside_in.inference.load import load_saved_model
from outside_in.storage import metrics
from outside_in.training import loop, monitor, setup

pytestmark = pytest.mark.slow

RARE = 100  # a token that stands at one place alone
STEP, MICROBATCH, SEQUENCE = 3, 2, 1  # there, the step from 1
FIRST_TOKEN = CONTEXT_LENGTH * (((STEP - 1) * 4 + MICROBATCH) * 2 + SEQUENCE)


@pytest.fixture
def train(call_program):
    return partial(call_program, "train")


@pytest.fixture
def rare_run(make_run, token_folder):
    """Make a run in whose tokens `RARE` stands in one sequence, read in the order of the file."""
    tokens = random_tokens(2000) % RARE
    tokens[FIRST_TOKEN + 5] = RARE
    save_file({"tokens": tokens}, token_folder / "train.safetensors")
    return lambda **train: make_run(train={"shuffle": False, "checkpoint_interval": 100} | train)


@pytest.fixture
def poisoned(monkeypatch):
    """Let every new model have an embedding of `RARE` that is not finite."""

    def create(*arguments):
        model = steps_create(*arguments)
        model.token_embedding.embedding[RARE] = np.nan
        return model

    steps_create = setup.model_of
    monkeypatch.setattr(setup, "model_of", create)


def hash_lines(output):
    return re.findall(r"  step (\d+): ((?:\S+ [0-9a-f]{16}(?: \(unchanged\))?(?:, )?)+)$", output, re.M)


def test_an_update_that_changes_nothing_stops_the_run(train, make_run, monkeypatch):
    class Lost(train_step.Compiled):
        """A step that updates copies, as a mutating one does under jax.jit."""

        def __call__(self, model, optimizer, *rest):
            graph, state = nnx.split((model, optimizer))
            return super().__call__(*nnx.merge(graph, jax.tree.map(jnp.copy, state)), *rest)

    monkeypatch.setattr(train_step, "Compiled", Lost)
    line = complaint(train(make_run()), code=1)
    assert "changed no parameter" in line and "jax.jit instead of nnx.jit" in line and "learning_rate 0" in line


def test_hashes_after_every_step_are_those_of_what_is_saved(train, make_run):
    run = make_run(train={"keep_checkpoints": None})
    lines = dict(hash_lines(train(run, "--hash-parameters").stdout))
    assert list(map(int, lines)) == list(range(1, 13))
    for checkpoint in find_checkpoints(run / "checkpoints"):
        hashes = parameter_hashes(load_saved_model(checkpoint.path / "model.safetensors"))
        assert lines[str(checkpoint.global_step)] == ", ".join(f"{name} {digest}" for name, digest in hashes.items())


def test_a_pattern_limits_them_and_what_is_rejected_is_unchanged(train, rare_run, poisoned):
    finished = train(rare_run(), "--hash-parameters", "output_norm.*")
    lines = dict(hash_lines(finished.stdout))
    assert len(lines) == 12
    assert all(
        re.findall(r"[a-z_]+\.[a-z]+", line) == ["output_norm.bias", "output_norm.scale"] for line in lines.values()
    )
    assert [int(step) for step, line in lines.items() if line.count("(unchanged)") == 2] == [STEP]


def test_a_pattern_that_matches_nothing_is_one_line(train, make_run):
    assert "no parameter matches 'wte'" in complaint(train(make_run(), "--hash-parameters", "wte"))


def test_a_run_that_was_taken_for_a_pattern_is_one_line(train, make_run):
    assert "expected the run before --hash-parameters" in complaint(train("--hash-parameters", make_run()))


@pytest.mark.parametrize("per_call", [None, 1])
def test_a_rejected_update_is_described(train, rare_run, poisoned, per_call):
    run = rare_run(microbatches_per_call=per_call)
    finished = train(run)
    assert finished.returncode == 0
    assert [path.name for path in run.glob("rejected-*")] == [f"rejected-{STEP}.json"]
    known = json.loads((run / f"rejected-{STEP}.json").read_text())
    assert known["global_step"] == STEP
    assert known["first_loss_not_finite"] == MICROBATCH
    assert [microbatch["loss"] is None for microbatch in known["microbatches"]] == [i == MICROBATCH for i in range(4)]
    assert known["microbatches"][MICROBATCH]["first_tokens"][SEQUENCE] == FIRST_TOKEN
    assert known["parameters_not_finite"] == ["token_embedding.embedding"]
    norms = known["gradient_norms_of_each_call"]
    assert known["first_gradient_not_finite"] == "head.embedding" and len(norms) == 16
    assert known["reason"] == "a gradient is not finite" and known["largest_gradient"] is None
    assert "WARNING step 3: the update was rejected: a gradient is not finite" in finished.stdout
    bad_calls = [MICROBATCH] if per_call else [0]
    assert [i for i, norm in enumerate(norms["head.embedding"]) if norm is None] == bad_calls


def test_positions_count_from_the_start_of_the_file(train, rare_run, poisoned):
    run = rare_run(start_train_token=CONTEXT_LENGTH * 8)  # one step fewer
    assert train(run).returncode == 0
    [path] = run.glob("rejected-*")
    known = json.loads(path.read_text())
    assert known["global_step"] == STEP - 1
    assert known["microbatches"][MICROBATCH]["first_tokens"][SEQUENCE] == FIRST_TOKEN


def test_going_back_keeps_the_descriptions(train, make_run):
    run = make_run()
    assert train(run).returncode == 0
    (run / "rejected-6.json").write_text("{}")
    assert train(run, "--from", find_checkpoints(run / "checkpoints")[0].path.name).returncode == 0
    assert (run / "rejected-6.json").read_text() == "{}"


def test_a_description_that_cannot_be_written_is_a_warning(train, rare_run, poisoned):
    run = rare_run()
    (run / f"rejected-{STEP}.json.tmp").mkdir()
    finished = train(run)
    assert finished.returncode == 0
    assert f"WARNING step {STEP}: the update was rejected, and its record cannot be written" in finished.stdout


def test_what_a_check_finds_is_said_after_saving(train, make_run, monkeypatch):
    def finds(model):
        return lambda model, call, key: "global step 4: bad" if call.position[0] == 3 else None

    monkeypatch.setattr(monitor, "make_checks", finds)
    run = make_run()
    assert complaint(train(run, "--debug-checks"), code=1).endswith("global step 4: bad; saved at step 3")
    assert [record["global_step"] for record in metrics.read(run / "metrics.jsonl")] == [1, 2, 3]
    assert [checkpoint.global_step for checkpoint in find_checkpoints(run / "checkpoints")] == [3]
    assert train(run).returncode == 0


@pytest.mark.parametrize("options", [["--check", "--from", "best"], ["--find-microbatch", "--debug-checks"]])
def test_options_that_would_be_ignored_are_refused(train, make_run, options):
    assert "since it trains nothing" in complaint(train(make_run(), *options))


def test_a_run_that_is_stuck_says_where_to_look(train, make_run, monkeypatch, poisoned):
    monkeypatch.setattr(setup, "model_of", partial(all_poisoned, setup.model_of))
    run = make_run(train={"max_consecutive_rejections": 3})
    line = complaint(train(run), code=1)
    assert f"{run / 'rejected-'}" in line and "(see " in line


def all_poisoned(create, *arguments):
    model = create(*arguments)
    model.output_norm.scale[...] = np.full(TINY_MODEL["emb_dim"], np.nan)
    return model


@pytest.mark.parametrize("flags", [["--hash-parameters"], ["--debug-checks"]])
def test_the_compiled_step_is_the_same_with_and_without_flags(train, make_run, monkeypatch, flags):
    texts = []

    def compile_and_keep(*arguments):
        compiled = train_step.compile_train_step(*arguments)
        texts.append(compiled._compiled.as_text())
        return compiled

    monkeypatch.setattr(loop, "compile_train_step", compile_and_keep)
    assert train(make_run("plain")).returncode == 0
    assert train(make_run("watched"), *flags).returncode == 0
    plain, watched = texts
    assert plain == watched


def test_each_step_is_traced_once_in_a_run(train, make_run, monkeypatch):
    traces = []

    def count(name):
        function = getattr(train_step, name)

        def counted(*arguments):
            traces.append(name)
            return function(*arguments)

        monkeypatch.setattr(train_step, name, counted)

    jax.clear_caches()
    count("mean_gradient")  # of the training step
    count("shard_map_with_gather")  # of both
    assert train(make_run()).returncode == 0
    assert sorted(traces) == ["mean_gradient", "shard_map_with_gather", "shard_map_with_gather"]


def test_an_update_that_moves_only_biases_stops_the_run(train, make_run):
    line = complaint(train(make_run(train={"learning_rate": 1e-30, "weight_decay": 0.0})), code=1)
    assert "changed no matrix, only blocks.0" in line and "too small for float32" in line


def overflowing(create, *arguments):
    """A model whose gradients are finite, but not their norm."""
    model = create(*arguments)
    model.output_norm.scale[...] = np.full(TINY_MODEL["emb_dim"], 1e-25)
    model.head.embedding[...] *= 1e27
    return model


def test_an_overflow_of_the_norm_is_called_that(train, make_run, monkeypatch):
    monkeypatch.setattr(setup, "model_of", partial(overflowing, setup.model_of))
    run = make_run(train={"max_consecutive_rejections": 2, "clipping_max_norm": 1e40})
    finished = train(run)
    assert "WARNING step 1: the update was rejected: the norm of the gradient overflows float32" in finished.stdout
    known = json.loads((run / "rejected-1.json").read_text())
    norms = {name: norm for name, [norm] in known["gradient_norms_of_each_call"].items()}
    assert known["first_gradient_not_finite"] is None and known["largest_gradient"] == max(norms, key=norms.get)
    assert 1e19 < max(norms.values()) < np.inf
    assert "or gradient norms, were not finite" in complaint(finished, code=1)
    line = complaint(train(make_run("checked"), "--debug-checks"), code=1)
    assert "global step 1: gradient of output_norm" in line and "its norm overflows float32" in line


@pytest.fixture
def breaking_run(make_run, token_folder, use_model):
    """Make a run that learns a cycle of tokens, until `RARE`, which gives NaN, stands in every step from the eighth."""

    class Breaking(GPTModel):
        def embed(self, tokens_BT):
            return jnp.where((tokens_BT == RARE)[..., None], jnp.nan, super().embed(tokens_BT))

    use_model(Breaking)
    cycle = np.arange(2000, dtype=np.uint16) % 7
    save_file({"tokens": cycle[:200]}, token_folder / "validation.safetensors")
    cycle[7 * 4 * 2 * CONTEXT_LENGTH :: 5] = RARE
    save_file({"tokens": cycle}, token_folder / "train.safetensors")
    return lambda **train: make_run(train={"shuffle": False, "max_consecutive_rejections": 2} | train)


def typed(line):
    """Return the arguments of the command that a message ends with."""
    return line.partition("uv run train.py ")[2].split()


def lower_learning_rate(run):
    path = run / "train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"learning_rate": 0.001}))


def test_the_way_back_works_when_it_is_typed(train, breaking_run):
    run = breaking_run()
    line = complaint(train(run), code=1)
    assert "2 updates in a row were rejected" in line and "lower learning_rate, or check the data" in line
    assert typed(line) == [str(run), "--from", "best", "--accept-changes"]
    lower_learning_rate(run)
    assert "resuming from step 5 of 12" in train(*typed(line)).stdout


def test_without_a_best_checkpoint_the_way_is_another_start(train, breaking_run):
    run = breaking_run(checkpoint_interval=100)
    line = complaint(train(run), code=1)
    assert "there is no best checkpoint to go back to" in line and "--from" not in line
    (run / "checkpoints").rename(run / "checkpoints-aside")
    lower_learning_rate(run)
    train(*typed(line))
    assert metrics.read(run / "metrics.jsonl")[0]["learning_rate"] == pytest.approx(0.001)


def test_a_best_checkpoint_that_has_diverged_is_called_that(train, breaking_run, monkeypatch):
    def loud(create, *arguments):
        model = create(*arguments)
        model.head.embedding[...] *= 1e4
        return model

    monkeypatch.setattr(setup, "model_of", partial(loud, setup.model_of))
    run = breaking_run()
    line = complaint(train(run), code=1)
    assert "the best checkpoint, of step 5, is no better than a uniform guess (loss " in line
    assert "against 4.6151), so it has diverged too" in line
    assert typed(line) == [str(run)]


def test_the_way_back_bears_a_best_checkpoint_from_before_there_was_validation(train, breaking_run):
    run = breaking_run(val_tokens=0)
    complaint(train(run), code=1)
    path = run / "train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"val_tokens": 64}))
    line = complaint(train(run, "--from", "best", "--accept-changes"), code=1)
    assert typed(line) == [str(run), "--from", "best", "--accept-changes"]
