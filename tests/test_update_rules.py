"""Muon, Lion and Adafactor in the place of AdamW."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_same, complaint, final_state, on_step, send, tiny_model_config, tiny_train_config

from model import create_model
from outside_in.optimizer import make_optimizer, update_report
from outside_in.update_rules import RULES, count_moments, describe_rule
from outside_in.weights import named_arrays

OTHERS = sorted(set(RULES) - {"adamw"})
NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)


class Layers(nnx.Module):
    """A model of parameters alone, with the names that matter."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.table = nnx.Param(jnp.asarray(rng.normal(size=(5, 4)), jnp.float32))
        self.blocks = nnx.List([nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.Embed(3, 4, rngs=nnx.Rngs(1))])


def arrays(model):
    return {name: np.asarray(x, np.float64) for name, x in named_arrays(nnx.state(model, nnx.Param)).items()}


@nnx.jit
def update(model, optimizer, grads):
    optimizer.update(model, grads)


def random_gradients(model, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), nnx.state(model, nnx.Param))


def trained(config, steps=3):
    """The parameters before each step and after the last one, and the gradients."""
    model = Layers()
    optimizer = make_optimizer(model, config, 100)
    states, gradients, rates = [arrays(model)], [], []
    for step in range(steps):
        gradients.append(grads := random_gradients(model, step))
        update(model, optimizer, grads)
        states.append(arrays(model))
        rates.append(float(update_report(optimizer, config).learning_rate))
    named = [{n: np.asarray(x, np.float64) for n, x in named_arrays(grads).items()} for grads in gradients]
    return states, named, rates


def test_muon_is_its_definition_on_the_matrices_of_blocks_and_adamw_on_all_else():
    shape = {"learning_rate": 0.02, "weight_decay": 0.1, "clipping_max_norm": None, "warmup_period_percent": 0}
    states, gradients, rates = trained(tiny_train_config(optimizer="muon", muon_learning_rate=0.05, **shape))
    as_adamw, _, _ = trained(tiny_train_config(**shape))
    kernel, momentum = "blocks.0.kernel", 0.0
    for step, (before, after) in enumerate(itertools.pairwise(states)):
        gradient, rate = gradients[step][kernel], rates[step] * 0.05 / 0.02
        momentum = 0.95 * momentum + 0.05 * gradient
        # Nesterov's look ahead, each part without its bias towards the zeros that it began with
        x = 0.95 * momentum / (1 - 0.95 ** (step + 2)) + 0.05 * gradient / (1 - 0.95 ** (step + 1))
        x = x / np.linalg.norm(x)
        for _ in range(5):
            a, b, c = NEWTON_SCHULZ
            square = x @ x.T
            x = a * x + (b * square + c * square @ square) @ x
        expected = before[kernel] - rate * (x * np.sqrt(6 / 4) + 0.1 * before[kernel])
        np.testing.assert_allclose(after[kernel], expected, rtol=1e-4, atol=1e-6)
        for name in after.keys() - {kernel}:
            np.testing.assert_array_equal(after[name], as_adamw[step + 1][name], err_msg=name)
        assert (after[kernel] != as_adamw[step + 1][kernel]).all()


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_muon_takes_queries_keys_and_values_apart(n_kv_heads):
    config = tiny_train_config(optimizer="muon", weight_decay=0.1, warmup_period_percent=0, clipping_max_norm=None)
    model, name = create_model(tiny_model_config(n_kv_heads=n_kv_heads), 0), "blocks.0.attention.query_key_value.kernel"
    gradients, before = random_gradients(model, 0), arrays(model)[name]
    fused = gradients["blocks"][0]["attention"]["query_key_value"]["kernel"]
    fused[...] = fused[...].at[:, :32].multiply(0.01)  # so that in one matrix, the updates of queries would be small
    update(model, make_optimizer(model, config, 100), gradients)
    changes = (arrays(model)[name] - before * (1 - 0.1 * config.learning_rate)) / config.learning_rate
    edges = [32, 32 + 8 * n_kv_heads]
    for gradient, change in zip(np.split(np.float64(fused[...]), edges, axis=1), np.split(changes, edges, axis=1)):
        left, _, right = np.linalg.svd(gradient, full_matrices=False)
        singular = np.diag(left.T @ -change @ right.T)
        assert singular.min() > 0.5 and singular.max() < 1.3


def test_lion_goes_by_the_sign_of_its_momentum():
    config = tiny_train_config(optimizer="lion", beta1=0.8, beta2=0.9, weight_decay=0.1, clipping_max_norm=None)
    states, gradients, rates = trained(config)
    for name in states[0]:
        momentum = 0.0
        for step, (before, after) in enumerate(itertools.pairwise(states)):
            gradient = gradients[step][name]
            sign = np.sign(0.8 * momentum + 0.2 * gradient)
            momentum = 0.9 * momentum + 0.1 * gradient
            expected = before[name] - rates[step] * (sign + 0.1 * before[name])
            np.testing.assert_allclose(after[name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("on", ["all", "matrices"])
def test_only_what_should_decay_decays_by_the_learning_rate(rule, on):
    config = tiny_train_config(optimizer=rule, weight_decay=0.5, weight_decay_on=on, warmup_period_percent=0)
    model = Layers()
    nnx.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    optimizer = make_optimizer(model, config, 100)
    update(model, optimizer, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
    for name, array in arrays(model).items():
        decays = on == "all" or array.ndim == 2
        np.testing.assert_allclose(array, 1 - 0.5 * config.learning_rate * decays, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("per_call", [None, 1])
def test_a_rejected_update_changes_nothing(rule, per_call):
    config = tiny_train_config(optimizer=rule, microbatches_per_call=per_call, gradient_accumulation_steps=2)
    model = Layers()
    optimizer = make_optimizer(model, config, 100)

    def step(seed, spoil=lambda x: x):
        for call in range(config.calls_per_step):
            grads = random_gradients(model, seed + call)
            update(model, optimizer, jax.tree.map(spoil, grads) if call == 0 else grads)
        return update_report(optimizer, config)

    assert not step(0).rejected
    before = jax.tree.map(np.asarray, nnx.state((model, optimizer)))
    report = step(2, lambda x: x.at[0].set(jnp.nan))
    assert report.rejected and report.rejected_updates == 1
    after = jax.tree.map(np.asarray, nnx.state((model, optimizer)))
    moments = [str(path) for path, x in jax.tree_util.tree_leaves_with_path(before) if x.ndim]
    changed = [
        str(path)
        for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after))
        if not np.array_equal(old, new, equal_nan=True) and "acc_grads" not in str(path)
    ]
    assert moments and not set(changed) & set(moments)
    assert not step(4).rejected
    assert all(np.isfinite(array).all() for array in arrays(model).values())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [{}, {"emb_dim": 128, "vocab_size": 300}])
def test_the_moments_are_counted(rule, shape):
    config, model = tiny_train_config(optimizer=rule), create_model(tiny_model_config(**shape), 0)
    shapes = {name: array.shape for name, array in named_arrays(nnx.state(model, nnx.Param)).items()}
    parameters = sum(map(np.prod, shapes.values()))
    kept = nnx.state(make_optimizer(model, config, 100))
    counted = sum(x.size for x in jax.tree.leaves(kept) if x.size > 1)
    # Scalars: counters, the learning rate; and Adafactor's places for what it does not keep.
    assert abs(count_moments(config, shapes) - counted) <= 3 * len(shapes) + 20
    share = {"adamw": 2, "muon": 2, "lion": 1, "adafactor": 1}[rule]
    assert count_moments(config, shapes) <= share * parameters + 3 * len(shapes) + 20


def test_a_rate_for_muon_without_muon_is_refused():
    with pytest.raises(
        ValueError, match='optimizer="adamw" has no muon_learning_rate; set muon_learning_rate=null, its default'
    ):
        tiny_train_config(muon_learning_rate=0.02)


def test_the_rule_is_named_and_what_muon_takes():
    shapes = {
        "blocks.0.query_key_value.kernel": (4, 6),
        "blocks.1.kernel": (4, 4),
        "blocks.1.bias": (4,),
        "table": (5, 4),
    }
    config = tiny_train_config(optimizer="muon", muon_learning_rate=0.02)
    expected = "rule    muon on 40 parameters in 4 matrices of blocks, peak 0.02; adamw on all others"
    assert describe_rule(config, shapes) == expected
    assert describe_rule(tiny_train_config(optimizer="lion"), shapes) == "rule    lion"


@pytest.mark.slow
@pytest.mark.parametrize("rule", OTHERS)
def test_a_run_resumes_bit_for_bit(call_program, make_run, monkeypatch, rule):
    train = {"optimizer": rule, "learning_rate": 0.003}
    alone, stopped = make_run("alone", train=train), make_run("stopped", train=train)
    assert call_program("train", alone).returncode == 0
    with monkeypatch.context() as patched:
        on_step(patched, "training step", 7, lambda: send(2))
        assert call_program("train", stopped).returncode == 130
    assert call_program("train", stopped).returncode == 0
    assert_same(final_state(alone), final_state(stopped))
    told = complaint(call_program("train", stopped, "optimizer=adamw"))
    assert "--new" in told and "optimizer=adamw" in told
