"""A run on 1, 2, 4 and 8 devices is one run: the same losses and masks, and only the traffic that theory asks for."""

import json
import re
import signal
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import (
    CONTEXT_LENGTH,
    VOCAB_SIZE,
    complaint,
    final_state,
    on_step,
    random_tokens,
    send,
    tiny_model,
    tiny_train_config,
)
from modern import ALL
from test_golden import GOLDEN, STEPS

from outside_in.config import MeshConfig, TrainConfig, with_sequences_per_step
from outside_in.data.loader import TokenStream, place_batch
from outside_in.inference.evaluation import compile_for, mean_loss
from outside_in.optimizer import make_optimizer
from outside_in.runtime.mesh import make_mesh, place
from outside_in.storage import metrics
from outside_in.train_step import train_step
from outside_in.training import checkpoint_writer
from outside_in.weights import host_arrays

pytestmark = pytest.mark.slow

SEQUENCES = 16  # of a global step
MESHES = [(2, 1), (8, 1), (1, 2), (1, 8), (2, 2), (2, 4)]
KEY = jax.random.key(7)
LARGER = {"emb_dim": 64, "n_layers": 2}  # some of its arrays are spread


def stream(mesh, sequences=SEQUENCES, size=1):
    devices = mesh.devices.size
    shape = (sequences // (size * devices), size * devices, CONTEXT_LENGTH)
    return TokenStream(jax.device_put(random_tokens(3000)), shape, "next-token", 0, shuffle=True)


def trained(data, fsdp, num_steps=4, per_call=None, optimizer="adamw", **changes):
    """Train on a mesh; return losses, gradient norms, and the parameters."""
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp))
    tokens = stream(mesh)
    shape = {"gradient_accumulation_steps": tokens.batch_shape[0], "microbatches_per_call": per_call}
    config = tiny_train_config(**shape, optimizer=optimizer)
    model = tiny_model(**LARGER | changes)
    optimizer = make_optimizer(model, config, total_steps=20)
    place(model, mesh), place(optimizer, mesh)
    reports = []
    for step in range(num_steps):
        for call in tokens.calls(step, config.calls_per_step):
            report = train_step(model, optimizer, place_batch(call, mesh), KEY, config, mesh)
        reports.append((float(report.loss), float(report.update.gradient_norm)))
    return np.array(reports), host_arrays(nnx.state(model, nnx.Param)), (model, optimizer)


@pytest.fixture(scope="module")
def on_one():
    return {rate: trained(1, 1, drop_rate=rate) for rate in (0.0, 0.3)}


@pytest.mark.parametrize(("data", "fsdp"), MESHES)
@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
def test_any_mesh_trains_as_one_device_does(on_one, data, fsdp, drop_rate):
    reports, parameters, _ = trained(data, fsdp, drop_rate=drop_rate)
    expected, expected_parameters, _ = on_one[drop_rate]
    np.testing.assert_allclose(reports, expected, rtol=2e-5)
    for name, array in expected_parameters.items():
        np.testing.assert_allclose(parameters[name], array, atol=2e-4, err_msg=name)


def test_masks_make_a_difference(on_one):
    assert abs(on_one[0.0][0] - on_one[0.3][0]).max() > 1e-3


@pytest.mark.parametrize(
    "changes", [{"tied_head": True}, {"dtype": "bfloat16"}, {"qkv_bias": True}, ALL, ALL | {"drop_rate": 0.3}], ids=str
)
def test_other_models_are_spread_too(changes):
    expected, _, _ = trained(1, 1, num_steps=2, **changes)
    np.testing.assert_allclose(
        trained(2, 2, num_steps=2, **changes)[0], expected, rtol=1e-2 if "dtype" in changes else 2e-5
    )


@pytest.mark.parametrize("optimizer", ["muon", "lion", "adafactor"])
def test_other_optimizers_are_spread_too(optimizer):
    expected, parameters, _ = trained(1, 1, num_steps=3, optimizer=optimizer)
    found, spread, _ = trained(2, 2, num_steps=3, optimizer=optimizer)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    differences = [abs(spread[name] - array).max() for name, array in parameters.items()]
    assert optimizer == "lion" or max(differences) < 1e-3  # a sign turns round with the last digit of a sum


# Parameters are spread, and their moments: embedding, head, and four matrices in each of two blocks.
@pytest.mark.parametrize(("optimizer", "expected"), [("adamw", 3 * 10), ("muon", 10 + 2 * 2 + 8)])
def test_arrays_stay_where_the_rule_has_them(optimizer, expected):
    _, _, modules = trained(2, 4, num_steps=2, optimizer=optimizer)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    spread = 0
    for module in modules:
        before = [array.sharding for array in jax.tree.leaves(nnx.state(module))]
        place(module, mesh)
        after = [array.sharding for array in jax.tree.leaves(nnx.state(module))]
        assert before == after
        spread += sum(not sharding.is_fully_replicated for sharding in after)
    assert spread == expected


def test_golden_losses_hold_on_eight_devices():
    mesh = make_mesh(MeshConfig())
    config, model = tiny_train_config(drop_rate=0.1, gradient_accumulation_steps=1), tiny_model(drop_rate=0.1)
    optimizer = make_optimizer(model, config, STEPS)
    place(model, mesh), place(optimizer, mesh)
    tokens = TokenStream(jax.device_put(random_tokens(129)), (1, 8, CONTEXT_LENGTH), "next-token", 0, shuffle=False)
    losses = []
    for step in range(STEPS):
        [call] = tokens.calls(step)
        losses.append(
            float(train_step(model, optimizer, place_batch(call, mesh), jax.random.key(1), config, mesh).loss)
        )
    golden = json.loads(GOLDEN.read_text())
    np.testing.assert_allclose(losses, golden["loss"], rtol=2e-4)


@pytest.mark.parametrize("batches", [1, 5, 8, 9])
def test_validation_counts_every_sequence_once_on_any_mesh(batches):
    tokens = TokenStream(
        jax.device_put(random_tokens(batches * 2 * CONTEXT_LENGTH + 1)), (1, 2, CONTEXT_LENGTH), "next-token", 0, False
    )
    model = tiny_model()
    alone = mean_loss(model, tokens)
    for data, fsdp in [(8, 1), (2, 2)]:
        mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp))
        place(model, mesh)
        assert mean_loss(model, tokens, step=compile_for(model, tokens, mesh), mesh=mesh) == pytest.approx(
            alone, rel=1e-6
        )


# The traffic, read from the compiled step


def collectives(data, fsdp, **changes):
    """List what is sent in a step of 2 microbatches: (kind, shape of the result, whether it is inside a loop)."""
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp))
    [call] = stream(mesh).calls(0)
    config = tiny_train_config(gradient_accumulation_steps=call.inputs.shape[0])
    model = tiny_model(**LARGER | changes)
    optimizer = make_optimizer(model, config, total_steps=20)
    place(model, mesh), place(optimizer, mesh)
    text = train_step.lower(model, optimizer, place_batch(call, mesh), KEY, config, mesh).compile().as_text()
    bodies = dict(re.findall(r"^(?:ENTRY )?%?([\w.-]+) .*?\{\n(.*?)^\}", text, re.M | re.S))
    in_loops = set(re.findall(r"body=%?([\w.-]+)", text))
    while (
        more := {n for b in in_loops for n in re.findall(r"(?:calls|to_apply|body)=%?([\w.-]+)", bodies.get(b, ""))}
        - in_loops
    ):
        in_loops |= more
    pattern = r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    return [
        (kind, tuple(int(n) for n in numbers.split(",") if n), name in in_loops)
        for name, body in bodies.items()
        for shapes, kind in re.findall(pattern, body)
        for numbers in re.findall(r"\[([\d,]*)\]", shapes)
    ]


def numbers(sent):
    return sum(int(np.prod(shape)) for _, shape, _ in sent)


PARAMETERS = sum(array.size for array in jax.tree.leaves(nnx.state(tiny_model(**LARGER), nnx.Param)))


def test_data_parallel_reduces_each_gradient_once_a_global_step():
    sent = collectives(8, 1)
    assert {kind for kind, _, _ in sent} == {"all-reduce"}
    assert not [shape for _, shape, in_loop in sent if in_loop]
    assert PARAMETERS <= numbers(sent) <= PARAMETERS + 100  # and the losses


def test_fsdp_gathers_each_spread_parameter_once_and_scatters_its_gradient():
    sent = collectives(1, 8)
    assert not [shape for _, shape, in_loop in sent if in_loop]
    gathered = [shape for kind, shape, _ in sent if kind == "all-gather"]
    whole = [a.shape for a in jax.tree.leaves(nnx.state(tiny_model(**LARGER), nnx.Param)) if a.size >= 2048]
    assert len(gathered) == len(whole) == 10
    assert numbers([s for s in sent if s[0] == "all-gather"]) == sum(int(np.prod(shape)) for shape in whole)
    scattered = [s for s in sent if s[0] in ("reduce-scatter", "all-reduce")]
    assert numbers(scattered) <= PARAMETERS + 100


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (1, 8), (2, 4)])
def test_nothing_of_tokens_times_vocabulary_is_sent(data, fsdp):
    for _, shape, _ in collectives(data, fsdp):
        assert VOCAB_SIZE not in shape or int(np.prod(shape)) <= VOCAB_SIZE * 64


# Runs


@pytest.fixture
def train(call_program, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "sample", lambda training: [])
    return partial(call_program, "train")


SPREAD = {"microbatch_size": 1, "gradient_accumulation_steps": 8, "min_train_tokens": 12 * 8 * CONTEXT_LENGTH}


def set_mesh(run, **mesh):
    path = run / "train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mesh": mesh}))


def test_a_run_goes_on_on_any_number_of_devices(train, make_run, monkeypatch):
    alone = make_run("alone", train=SPREAD)
    assert train(alone).returncode == 0
    run = make_run("run", train=SPREAD)
    for mesh, stop_at in (({"data": 1}, 4), ({"data": 2, "fsdp": 2}, 4), ({"data": 2}, None)):
        set_mesh(run, **mesh)
        with monkeypatch.context() as patched:
            if stop_at:
                on_step(patched, "training step", stop_at, lambda: send(signal.SIGINT))
            finished = train(run)
        assert finished.returncode == (130 if stop_at else 0), finished.stderr
        assert "tokens: " in finished.stdout and "step    128 tokens" in finished.stdout
    expected, found = metrics.read(alone / "metrics.jsonl"), metrics.read(run / "metrics.jsonl")
    assert len(expected) == len(found) == 12
    for one, other in zip(expected, found):
        assert one["data_crc32"] == other["data_crc32"] and one["tokens_seen"] == other["tokens_seen"]
        assert other["loss"] == pytest.approx(one["loss"], rel=2e-5)
    assert final_state(run)["step"] == 12


def test_a_number_of_devices_that_does_not_divide_a_step_says_which_do(train, make_run):
    run = make_run(train=SPREAD | {"gradient_accumulation_steps": 2, "min_train_tokens": 12 * 2 * CONTEXT_LENGTH})
    with pytest.MonkeyPatch.context() as patched:
        on_step(patched, "training step", 4, lambda: send(signal.SIGINT))
        assert train(run).returncode == 130
    set_mesh(run, data=8)
    told = complaint(train(run))
    assert "2 sequences" in told and "use 1 or 2 devices (mesh)" in told


def test_the_preflight_says_what_becomes_of_each_array(train, make_run):
    finished = train(make_run(train=SPREAD | {"mesh": {"data": 2, "fsdp": 4}, "min_train_tokens": 1024}), "--check")
    assert finished.returncode == 0, finished.stderr
    assert "mesh    8 devices: data 2 × fsdp 4\n" in finished.stdout
    assert "step    1,024 tokens: 8 microbatches of 1 sequence on each of 8 devices" in finished.stdout
    assert "blocks.*.feed_forward.expand.kernel [32, 128]: axis 1 over fsdp" in finished.stdout
    assert "output_norm.scale [32]: whole on every device" in finished.stdout


@pytest.mark.parametrize(
    ("sequences", "devices", "size", "steps"), [(8, 1, 1, 8), (8, 4, 1, 2), (8, 2, 4, 1), (12, 3, 2, 2)]
)
def test_microbatches_are_as_many_as_make_the_sequences_of_a_step(sequences, devices, size, steps):
    config = tiny_train_config(microbatch_size=size, gradient_accumulation_steps=4, microbatches_per_call=4)
    adapted = with_sequences_per_step(config, sequences, devices)
    assert adapted.gradient_accumulation_steps == steps and steps % adapted.microbatches_per_call == 0
    assert isinstance(adapted, TrainConfig)
