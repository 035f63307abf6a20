"""The ladders: what changes from rung to rung, and nothing else."""

import itertools
import re

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import CONTEXT_LENGTH, ROOT, VOCAB_SIZE, random_tokens, tiny_train_config

from model import GPTModel, count_parameters
from outside_in.config import ModelConfig, TrainConfig
from outside_in.config_files import load_config
from outside_in.data.loader import TokenStream
from outside_in.inference.generation import generate
from outside_in.optimizer import make_optimizer
from outside_in.train_step import train_step

pytestmark = pytest.mark.slow

LADDERS = ("ladder", "mini-ladder")
ATTENTION = {"blocks.0.attention.query_key_value.kernel", "blocks.0.attention.output.kernel"}
FEED_FORWARD = {
    f"blocks.0.feed_forward.{layer}.{part}" for layer in ("expand", "project") for part in ("kernel", "bias")
}
MORE_LAYERS = {
    name.replace("blocks.0", f"blocks.{layer}") for name in ATTENTION | FEED_FORWARD for layer in range(1, 12)
}
INNER_NORMS = {
    f"blocks.{layer}.{norm}_norm.{part}"
    for layer in range(12)
    for norm in ("attention", "feed_forward")
    for part in ("scale", "bias")
}
CHANGES = {  # of each rung against the one below: keys of model.json, names of parameters
    "01-a-to-a": (set(), set()),
    "02-bigram": (set(), set()),
    "03-output-norm": ({"output_norm"}, {"output_norm.scale", "output_norm.bias"}),
    "04-one-head-attention": ({"n_layers"}, ATTENTION),
    "05-shortcut": ({"shortcut"}, set()),
    "06-positions": ({"position_embedding"}, {"position_embedding.embedding"}),
    "07-multi-head": ({"n_heads"}, set()),
    "08-feed-forward": ({"feed_forward"}, FEED_FORWARD),
    "09-twelve-layers": ({"n_layers"}, MORE_LAYERS),
    "10-pre-norm": ({"pre_norm"}, INNER_NORMS),
    "11-attention-output-bias": (
        {"attention_output_bias"},
        {f"blocks.{layer}.attention.output.bias" for layer in range(12)},
    ),
}
RUNGS = list(CHANGES)
MODERN = {  # of each rung the one that it builds on, and the keys that change
    "01-gpt2": (None, set()),
    "02-rms-norm": ("01-gpt2", {"norm"}),
    "03-rope": ("02-rms-norm", {"position", "position_embedding"}),
    "04-qk-norm": ("03-rope", {"qk_norm"}),
    "05-relu2": ("04-qk-norm", {"feed_forward"}),
    "05b-swiglu": ("04-qk-norm", {"feed_forward"}),
    "06-no-biases": ("05-relu2", {"bias", "attention_output_bias"}),
    "07-grouped-queries": ("06-no-biases", {"n_kv_heads"}),
    "08-soft-cap": ("07-grouped-queries", {"logit_soft_cap"}),
    "09-value-embeddings": ("08-soft-cap", {"value_embeddings"}),
    "10-wsd": ("09-value-embeddings", {"schedule"}),
    "11-muon": ("10-wsd", {"optimizer", "muon_learning_rate"}),
}


def parameter_counts(vocab, width, context):
    """Count the parameters of each rung by hand."""
    shell = 2 * vocab * width
    norm = 2 * width
    attention = 3 * width**2 + width**2
    positions = context * width
    feed_forward = 4 * width**2 + 4 * width + 4 * width**2 + width
    one_layer = shell + norm + attention + positions
    twelve_layers = one_layer + feed_forward + 11 * (attention + feed_forward)
    pre_norm = twelve_layers + 12 * 2 * norm
    counts = [shell, shell, shell + norm, shell + norm + attention, shell + norm + attention]
    return [*counts, one_layer, one_layer, one_layer + feed_forward, twelve_layers, pre_norm, pre_norm + 12 * width]


def modern_parameter_counts():
    """Count the parameters of each modern rung by hand: 4 layers, width 64, 4 heads, context 64, 257 ids."""
    gelu, swiglu = 2 * 64 * 256 + 256 + 64, 3 * 64 * 176 + 2 * 176 + 64
    gpt2 = 2 * 257 * 64 + 64 * 64 + 9 * 2 * 64 + 4 * (4 * 64**2 + 64 + gelu)
    rms_norm = gpt2 - 9 * 64
    rope = rms_norm - 64 * 64
    qk_norm = rope + 4 * 2 * 16
    no_biases = qk_norm - 4 * (64 + 256 + 64)
    grouped = no_biases - 4 * 64 * 64
    value_embeddings = grouped + 2 * (257 * 32 + 1)
    of_feed_forward = [qk_norm, qk_norm + 4 * (swiglu - gelu)]
    return [gpt2, rms_norm, rope, qk_norm, *of_feed_forward, no_biases, grouped, grouped, *3 * [value_embeddings]]


def both_configs(ladder, rung):
    return model_config(ladder, rung).model_dump() | train_config(ladder, rung).model_dump()


def changes(below, above):
    return {key: value for key, value in above.items() if value != below[key]}


def model_config(ladder, rung):
    return load_config(ROOT / "runs" / ladder / rung / "model.json", ModelConfig)


def train_config(ladder, rung):
    return load_config(ROOT / "runs" / ladder / rung / "train.json", TrainConfig)


def parameter_names(config):
    state = nnx.state(nnx.eval_shape(lambda: GPTModel(config, nnx.Rngs(0))), nnx.Param)
    return {".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}


@pytest.mark.parametrize("ladder", [*LADDERS, "modern-ladder"])
def test_the_rungs_are_all_there_and_each_has_its_readme(ladder):
    folders = sorted(path for path in (ROOT / "runs" / ladder).iterdir() if (path / "train.json").exists())
    assert [folder.name for folder in folders] == list(MODERN if ladder == "modern-ladder" else RUNGS)
    for folder in folders:
        text = (folder / "README.md").read_text()
        assert re.fullmatch(
            rf"# {folder.name}\n\n\*\*New:\*\* .+\n\n\*\*Expect:\*\* .*\d.*\n(\n\*\*Writes:\*\* `.+`\n)?", text
        )


def test_the_reference_rungs_have_their_published_sizes():
    counts = [count_parameters(model_config("ladder", rung)) for rung in RUNGS]
    assert counts == parameter_counts(50257, 768, 1024)
    assert counts[0] == 77_194_752 and counts[-2:] == [163_000_320, 163_009_536]


def test_the_small_rungs_have_the_sizes_that_a_hand_computes():
    top = model_config("mini-ladder", RUNGS[-1])
    counts = [count_parameters(model_config("mini-ladder", rung)) for rung in RUNGS]
    assert counts == parameter_counts(257, top.emb_dim, top.context_length)


@pytest.mark.parametrize("ladder", LADDERS)
def test_from_rung_to_rung_only_the_switches_of_its_name_change(ladder):
    for lower, upper in itertools.pairwise(RUNGS):
        keys, parameters = CHANGES[upper]
        below, above = model_config(ladder, lower), model_config(ladder, upper)
        changed = {key for key, value in above.model_dump().items() if value != getattr(below, key)}
        assert changed == keys, upper
        assert parameter_names(above) - parameter_names(below) == parameters, upper
        assert parameter_names(below) <= parameter_names(above), upper


def test_from_modern_rung_to_rung_only_the_part_of_its_name_changes():
    for rung, (below, keys) in MODERN.items():
        if below:
            changed = changes(both_configs("modern-ladder", below), both_configs("modern-ladder", rung))
            assert set(changed) == keys, rung
    first, last = (both_configs(*rung) for rung in (("modern-ladder", "01-gpt2"), ("mini-ladder", RUNGS[-1])))
    assert changes(last, first) == {"n_layers": 4}
    assert [count_parameters(model_config("modern-ladder", rung)) for rung in MODERN] == modern_parameter_counts()


def test_the_last_modern_rung_at_the_size_of_gpt2_small_has_the_same_parts():
    small, gpt2, first, last = (
        both_configs(*run)
        for run in (("", "modern-124m"), ("", "gpt2-124m"), ("modern-ladder", "01-gpt2"), ("modern-ladder", "11-muon"))
    )
    of_the_ladder, of_gpt2_small = changes(first, last), changes(gpt2, small)
    assert small["n_heads"] / small["n_kv_heads"] == last["n_heads"] / last["n_kv_heads"]
    assert set(of_gpt2_small) - set(of_the_ladder) == {"qkv_bias", "learning_rate"}
    assert of_gpt2_small | of_the_ladder | {"n_kv_heads": 6} == of_gpt2_small


@pytest.mark.parametrize("ladder", LADDERS)
def test_all_rungs_but_the_first_train_alike(ladder):
    first, *others = (train_config(ladder, rung).model_dump() for rung in RUNGS)
    assert first["objective"] == "a-to-a"
    assert all(other == others[0] for other in others)
    assert others[0]["objective"] == "next-token"


@pytest.mark.parametrize(("ladder", "rung"), [*(("ladder", r) for r in RUNGS), *(("modern-ladder", r) for r in MODERN)])
def test_every_rung_takes_a_step_and_generates(ladder, rung):
    shrunk = {"vocab_size": VOCAB_SIZE, "emb_dim": 48, "context_length": CONTEXT_LENGTH}
    config = model_config(ladder, rung)
    config = config.model_copy(update=shrunk | {"n_layers": min(config.n_layers, 2)})
    model = GPTModel(config, nnx.Rngs(0))
    of_rung = train_config(ladder, rung)
    objective, parts = of_rung.objective, ("optimizer", "muon_learning_rate", "schedule")
    train = tiny_train_config(**{key: getattr(of_rung, key) for key in parts})
    stream = TokenStream(jax.device_put(random_tokens(2000)), (4, 2, CONTEXT_LENGTH), objective, seed=0, shuffle=True)
    optimizer = make_optimizer(model, train, total_steps=20)
    report = train_step(model, optimizer, *stream.calls(0), jax.random.key(0), train)
    assert report.loss == pytest.approx(np.log(VOCAB_SIZE), abs=0.2)
    assert not report.update.rejected
    [completion] = generate(model, [1, 2, 3], num_tokens=4)
    assert len(completion) == 4
