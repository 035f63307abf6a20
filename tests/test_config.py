"""The two JSON files: what is accepted, what is refused and in which words, and how long an epoch is."""

import json
import math

import pytest
from helpers import ROOT, TINY_MODEL, TINY_TRAIN, tiny_model_config, tiny_train_config
from pydantic import ValidationError

from outside_in.config import MeshConfig, ModelConfig, TrainConfig, steps_per_epoch, tokens_per_global_step
from outside_in.config_files import load_config, parse_config

MODEL_KEYS = """
vocab_size context_length emb_dim n_heads n_layers qkv_bias position_embedding pre_norm shortcut feed_forward
output_norm attention_output_bias tied_head
position norm feed_forward_dim qk_norm n_kv_heads bias logit_soft_cap embedding_scale value_embeddings sliding_window
window_pattern
"""
TRAIN_KEYS = """
dataset objective microbatch_size gradient_accumulation_steps microbatches_per_call min_train_tokens epochs
shuffle start_train_token start_val_token val_tokens learning_rate weight_decay weight_decay_on
beta1 beta2 epsilon schedule warmup_period_percent warmup_tokens decay_percent final_learning_rate_percent
clipping_max_norm drop_rate seed precision loss_rows_per_chunk remat checkpoint_interval checkpoint_first_step
keep_checkpoints initial_weights layer_norms_interval max_consecutive_rejections sample_prompt log_to mesh optimizer
muon_learning_rate
"""
SHIPPED_RUNS = sorted(path.parent for path in ROOT.glob("runs/*/train.json"))
REQUIRED = {ModelConfig: TINY_MODEL, TrainConfig: TINY_TRAIN}


def complaint(path, config_class):
    """The one line that is left of the error, without the file's name."""
    with pytest.raises(ValueError) as caught:
        load_config(path, config_class)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"{path}: ")
    return line.removeprefix(f"{path}: ")


@pytest.fixture
def complaint_about(tmp_path):
    def write_and_load(content, config_class=TrainConfig):
        path = tmp_path / "config.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return complaint(path, config_class)

    return write_and_load


def changed(config_class=TrainConfig, **changes):
    return json.dumps(REQUIRED[config_class] | changes)


def without(config_class, name):
    return json.dumps({key: value for key, value in REQUIRED[config_class].items() if key != name})


def test_the_keys_are_those_of_the_design():
    assert sorted(ModelConfig.model_fields) == sorted(MODEL_KEYS.split())
    assert sorted(TrainConfig.model_fields) == sorted(TRAIN_KEYS.split())


@pytest.mark.parametrize("config_class", [ModelConfig, TrainConfig, MeshConfig])
def test_every_key_says_what_its_change_means_on_resume(config_class):
    assert {config_class.on_resume(name) for name in config_class.model_fields} <= {"fatal", "announced", "free"}


@pytest.mark.parametrize(
    ("name", "on_resume"),
    [
        ("microbatch_size", "fatal"),
        ("gradient_accumulation_steps", "fatal"),
        ("objective", "fatal"),
        ("dataset", "free"),  # its content is compared
        ("min_train_tokens", "announced"),
        ("epochs", "announced"),
        ("seed", "fatal"),
        ("learning_rate", "announced"),
        ("schedule", "announced"),
        ("warmup_tokens", "announced"),
        ("epsilon", "announced"),
        ("clipping_max_norm", "announced"),
        ("weight_decay_on", "announced"),
        ("checkpoint_interval", "free"),
        ("sample_prompt", "free"),
        ("log_to", "free"),
    ],
)
def test_keys_have_the_class_that_the_design_gives_them(name, on_resume):
    assert TrainConfig.on_resume(name) == on_resume


def test_every_change_of_the_model_is_fatal():
    assert {ModelConfig.on_resume(name) for name in ModelConfig.model_fields} == {"fatal"}


@pytest.mark.parametrize("run", SHIPPED_RUNS, ids=lambda run: run.name)
def test_the_shipped_configs_load(run):
    load_config(run / "train.json", TrainConfig)
    load_config(run / "model.json", ModelConfig)


def test_the_runs_of_the_readme_are_shipped():
    assert {run.name for run in SHIPPED_RUNS} >= {"quickstart", "quickstart-a-to-a", "a-to-a", "gpt2-small", "gpt2-xl"}


@pytest.mark.parametrize(
    ("run", "changes", "steps", "tokens_per_step"),
    [
        ("gpt2-small", {}, 33_165, 98_304),
        ("gpt2-small", {"min_train_tokens": 92_160_000}, 938, 98_304),
        ("a-to-a", {}, 15_000, 6_144),
    ],
)
def test_the_reference_runs_have_their_published_number_of_steps(run, changes, steps, tokens_per_step):
    model = load_config(ROOT / "runs" / run / "model.json", ModelConfig)
    train = load_config(ROOT / "runs" / run / "train.json", TrainConfig).model_copy(update=changes)
    assert tokens_per_global_step(model, train) == tokens_per_step
    assert steps_per_epoch(model, train) == steps


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (127, 1), (128, 1), (129, 2), (10**12, 7_812_500_000)])
def test_min_train_tokens_is_rounded_up_to_whole_global_steps(tokens, steps):
    assert steps_per_epoch(tiny_model_config(), tiny_train_config(min_train_tokens=tokens)) == steps


@pytest.mark.parametrize(("available", "steps"), [(None, None), (0, 0), (1, 0), (128, 0), (129, 1), (256, 1), (257, 2)])
def test_all_tokens_are_whole_steps_and_one_last_target(available, steps):
    assert steps_per_epoch(tiny_model_config(), tiny_train_config(min_train_tokens=-1), available) == steps


@pytest.mark.parametrize(("per_call", "calls"), [(None, 1), (4, 1), (2, 2), (1, 4)])
def test_a_global_step_is_split_into_equal_calls(per_call, calls):
    assert tiny_train_config(microbatches_per_call=per_call).calls_per_step == calls


def test_a_config_with_loggers_can_be_hashed_as_compiling_needs():
    assert hash(tiny_train_config(log_to=["wandb"])) == hash(tiny_train_config(log_to=("wandb",)))


def test_a_config_cannot_be_changed_once_built():
    with pytest.raises(ValidationError, match="frozen"):
        tiny_train_config().seed = 1


@pytest.mark.parametrize("config_class", [ModelConfig, TrainConfig])
def test_only_the_first_handful_of_keys_is_required(config_class, complaint_about):
    required = {name for name, field in config_class.model_fields.items() if field.is_required()}
    assert required <= set(REQUIRED[config_class])
    for name in required:
        assert complaint_about(without(config_class, name), config_class) == f"missing key {name!r}"


def test_a_whole_number_is_a_fine_learning_rate():
    assert math.isclose(tiny_train_config(learning_rate=1).learning_rate, 1.0)


@pytest.mark.parametrize("changes", [{"mesh": {}}, {"mesh": {"data": 1}}, {"mesh": {"data": -1, "fsdp": 1}}])
def test_a_mesh_is_an_object_of_its_own(changes):
    assert parse_config(changed(**changes), TrainConfig, "train.json").mesh.fsdp == 1


@pytest.mark.parametrize(
    ("config_class", "typo", "meant"),
    [
        (TrainConfig, "gradient_acumulation_steps", "gradient_accumulation_steps"),
        (TrainConfig, "learningrate", "learning_rate"),
        (TrainConfig, "Seed", "seed"),
        (ModelConfig, "n_layer", "n_layers"),
        (ModelConfig, "vocabsize", "vocab_size"),
    ],
)
def test_an_unknown_key_names_the_key_that_was_meant(config_class, typo, meant, complaint_about):
    assert (
        complaint_about(changed(config_class, **{typo: 1}), config_class)
        == f"unknown key {typo!r}; did you mean {meant!r}?"
    )


def test_an_unknown_key_of_the_mesh_names_the_key_of_the_mesh_that_was_meant(complaint_about):
    line = complaint_about(changed(mesh={"dat": 1}))
    assert line.startswith("unknown key 'mesh.dat'; did you mean ")
    assert line.rstrip("'?").endswith("data")


@pytest.mark.parametrize("config_class", [ModelConfig, TrainConfig])
def test_an_unknown_key_like_no_other_lists_the_known_keys(config_class, complaint_about):
    line = complaint_about(changed(config_class, zzz=1), config_class)
    assert line.startswith("unknown key 'zzz'; known keys: ")
    assert all(name in line for name in config_class.model_fields)


@pytest.mark.parametrize(
    ("config_class", "name", "value", "got"),
    [
        (TrainConfig, "microbatch_size", "6", '"6"'),
        (TrainConfig, "microbatch_size", True, "true"),
        (TrainConfig, "microbatch_size", 6.5, "6.5"),
        (TrainConfig, "microbatch_size", None, "null"),
        (TrainConfig, "microbatch_size", [6], "[6]"),
        (TrainConfig, "learning_rate", "0.1", '"0.1"'),
        (TrainConfig, "learning_rate", True, "true"),
        (TrainConfig, "dataset", 1, "1"),
        (TrainConfig, "dataset", None, "null"),
        (TrainConfig, "objective", "next_token", '"next_token"'),
        (TrainConfig, "precision", "float16", '"float16"'),
        (TrainConfig, "mesh", 1, "1"),
        (TrainConfig, "log_to", "wandb", '"wandb"'),
        (ModelConfig, "qkv_bias", 0, "0"),
        (ModelConfig, "qkv_bias", "false", '"false"'),
        (ModelConfig, "emb_dim", {"a": 1}, '{"a": 1}'),
        (ModelConfig, "feed_forward", 1, "1"),
        (ModelConfig, "feed_forward", "silu", '"silu"'),
        (ModelConfig, "position", False, "false"),
        (ModelConfig, "norm", True, "true"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(config_class, name, value, got, complaint_about):
    line = complaint_about(changed(config_class, **{name: value}), config_class)
    assert line.startswith(f"{name}: expected ")
    assert line.partition("; did you mean")[0].endswith(f", got {got}")


@pytest.mark.parametrize(
    ("changes", "end"),
    [
        ({"objective": "next_token"}, "; did you mean 'next-token'?"),
        ({"log_to": ["tensorbord"]}, """, got "tensorbord"; did you mean 'tensorboard'?"""),
        ({"log_to": ["wandb", "mlflow"]}, ', got "mlflow"'),
        ({"log_to": "wandb"}, 'log_to: expected a list such as ["tensorboard"], got "wandb"'),
        ({"shuffle": "True"}, """shuffle: expected true or false, got "True"; did you mean 'true'?"""),
        ({"clipping_max_norm": "None"}, """expected a number such as 0.001, got "None"; did you mean 'null'?"""),
        ({"epochs": None}, "epochs: expected a valid integer, got null"),
        ({"epochs": True}, "epochs: expected a valid integer, got true"),
        ({"log_to": ["wandb", "wandb"]}, "log_to: expected each name once, got 'wandb' 2 times"),
    ],
)
def test_a_value_near_an_allowed_one_names_it(changes, end, complaint_about):
    assert complaint_about(changed(**changes)).endswith(end)


@pytest.mark.parametrize(
    ("config_class", "name", "value"),
    [
        (ModelConfig, "vocab_size", 1),
        (ModelConfig, "vocab_size", 65_537),
        (ModelConfig, "context_length", 0),
        (ModelConfig, "emb_dim", 0),
        (ModelConfig, "n_heads", 0),
        (ModelConfig, "n_layers", -1),
        (ModelConfig, "n_layers", 1001),
        (ModelConfig, "sliding_window", 0),
        (ModelConfig, "n_kv_heads", 0),
        (ModelConfig, "feed_forward_dim", 0),
        (ModelConfig, "logit_soft_cap", 0),
        (TrainConfig, "dataset", ""),
        (TrainConfig, "microbatch_size", 0),
        (TrainConfig, "gradient_accumulation_steps", 0),
        (TrainConfig, "min_train_tokens", -2),
        (TrainConfig, "learning_rate", 0),
        (TrainConfig, "learning_rate", 1001),
        (TrainConfig, "microbatches_per_call", 0),
        (TrainConfig, "loss_rows_per_chunk", 0),
        (TrainConfig, "epochs", 0),
        (TrainConfig, "start_train_token", -1),
        (TrainConfig, "start_val_token", -1),
        (TrainConfig, "val_tokens", -2),
        (TrainConfig, "weight_decay", -0.1),
        (TrainConfig, "beta2", -0.1),
        (TrainConfig, "beta2", 1),
        (TrainConfig, "warmup_period_percent", 100),
        (TrainConfig, "warmup_period_percent", -1),
        (TrainConfig, "warmup_tokens", -1),
        (TrainConfig, "decay_percent", 0),
        (TrainConfig, "decay_percent", 101),
        (TrainConfig, "final_learning_rate_percent", -1),
        (TrainConfig, "final_learning_rate_percent", 101),
        (TrainConfig, "beta1", -0.1),
        (TrainConfig, "beta1", 1),
        (TrainConfig, "epsilon", 0),
        (TrainConfig, "epsilon", 1e-40),
        (TrainConfig, "clipping_max_norm", 0),
        (TrainConfig, "drop_rate", 1),
        (TrainConfig, "drop_rate", -0.1),
        (TrainConfig, "seed", -1),
        (TrainConfig, "seed", 2**31),
        (TrainConfig, "seed", 10**30),
        (TrainConfig, "checkpoint_interval", 0),
        (TrainConfig, "keep_checkpoints", 0),
        (TrainConfig, "layer_norms_interval", 0),
        (TrainConfig, "max_consecutive_rejections", 0),
        (TrainConfig, "sample_prompt", ""),
        (TrainConfig, "mesh.data", -2),
        (TrainConfig, "mesh.fsdp", 0),
    ],
)
def test_a_value_out_of_range_is_refused(config_class, name, value, complaint_about):
    outer, _, inner = name.partition(".")
    line = complaint_about(changed(config_class, **{outer: {inner: value} if inner else value}), config_class)
    assert line.startswith(f"{name}: expected ")
    assert line.endswith(f", got {json.dumps(value)}")


@pytest.mark.parametrize(
    ("config_class", "changes", "line"),
    [
        (ModelConfig, {"emb_dim": 770, "n_heads": 12}, "emb_dim=770 is not divisible by n_heads=12; use 768 or"),
        (ModelConfig, {"emb_dim": 2, "n_heads": 4}, "emb_dim=2 is not divisible by n_heads=4; use 4 or change n_heads"),
        (ModelConfig, {"n_kv_heads": 3}, "n_kv_heads=3 does not divide n_heads=4; use one of 1, 2, 4"),
        (ModelConfig, {"n_kv_heads": 8}, "n_kv_heads=8 does not divide n_heads=4; use one of 1, 2, 4"),
        (
            ModelConfig,
            {"position": "rope", "emb_dim": 36},
            'position="rope" needs an even head width (emb_dim / n_heads), got 9; use emb_dim=40 or another n_heads',
        ),
        (
            ModelConfig,
            {"position": "rope", "position_embedding": True},
            'position="rope" and position_embedding=true contradict each other; set position_embedding=false',
        ),
        (
            ModelConfig,
            {"position": "learned", "position_embedding": False},
            'position="learned" and position_embedding=false contradict each other; set position_embedding=true',
        ),
        (ModelConfig, {"bias": False, "qkv_bias": True}, "bias=false and qkv_bias=true contradict each other; set"),
        (
            ModelConfig,
            {"bias": False, "attention_output_bias": True},
            "bias=false and attention_output_bias=true contradict each other; set attention_output_bias to false, or",
        ),
        (
            ModelConfig,
            {"value_embeddings": True, "qk_norm": True, "n_layers": 0},
            "qk_norm=true, value_embeddings=true: expected blocks, got n_layers=0; use n_layers=1 or more, or remove",
        ),
        (ModelConfig, {"sliding_window": 4, "n_layers": 0}, "sliding_window=4: expected blocks, got n_layers=0"),
        (ModelConfig, {"feed_forward_dim": 9, "feed_forward": False}, "remove feed_forward_dim, or set feed_forward"),
        (ModelConfig, {"window_pattern": "SL"}, 'window_pattern="SL" needs a window; set sliding_window, such as 4'),
        (ModelConfig, {"window_pattern": "SX", "sliding_window": 4}, "expected letters S (sliding) and L (all tokens)"),
        (ModelConfig, {"window_pattern": "", "sliding_window": 4}, 'window_pattern="": expected letters S'),
        (ModelConfig, {"window_pattern": "LS", "sliding_window": 4}, "has no S in the first 1 block; put one there"),
        (TrainConfig, {"min_train_tokens": 0}, "min_train_tokens=0: expected -1"),
        (
            TrainConfig,
            {"microbatches_per_call": 3},
            "=3 does not divide gradient_accumulation_steps=4",
        ),
        (TrainConfig, {"microbatches_per_call": 3}, "use one of 1, 2, 4"),
        (TrainConfig, {"mesh": {"data": 0}}, "data=0: expected -1"),
        (
            TrainConfig,
            {"muon_learning_rate": 0.02},
            'optimizer="adamw" has no muon_learning_rate; set muon_learning_rate=null, its',
        ),
        (
            TrainConfig,
            {"optimizer": "adafactor", "beta2": 0.95},
            'optimizer="adafactor" has no beta2; set beta2=0.999, its default, or use another optimizer',
        ),
        (TrainConfig, {"optimizer": "lion", "epsilon": 1e-6}, 'optimizer="lion" has no epsilon; set epsilon=1e-08'),
        (
            TrainConfig,
            {"decay_percent": 30},
            'schedule="cosine" has no decay_percent; set decay_percent=20.0, its default, or use another schedule',
        ),
        (
            TrainConfig,
            {"schedule": "constant", "final_learning_rate_percent": 0},
            'schedule="constant" has no final_learning_rate_percent; set final_learning_rate_percent=10.0',
        ),
        (
            TrainConfig,
            {"schedule": "wsd", "decay_percent": 100},
            "warmup_period_percent=5 and decay_percent=100 are more than 100 together; lower one",
        ),
    ],
)
def test_values_that_do_not_fit_together_are_refused_with_a_remedy(config_class, changes, line, complaint_about):
    assert line in complaint_about(changed(config_class, **changes), config_class)


@pytest.mark.parametrize(
    ("given", "implied"),
    [
        ({}, {"position": None, "position_embedding": True, "attention_output_bias": True, "bias": True}),
        ({"position_embedding": False}, {"position": None, "position_embedding": False}),
        ({"position": "learned"}, {"position_embedding": True}),
        ({"position": "rope"}, {"position_embedding": False}),
        ({"position": "none", "position_embedding": False}, {"position_embedding": False}),
        ({"bias": False}, {"attention_output_bias": False}),
    ],
    ids=str,
)
def test_new_keys_say_of_old_ones_what_they_mean_and_a_config_reads_what_it_wrote(given, implied):
    config = tiny_model_config(**given)
    assert config.model_dump().items() >= implied.items()
    assert parse_config(config.model_dump_json(), ModelConfig, "model.json") == config


def test_the_defaults_of_new_keys_are_those_of_gpt2():
    """Old files lack these keys, and mean what they meant."""
    config = tiny_model_config()
    assert (config.activation, config.inner_width, config.num_kv_heads) == ("gelu", 4 * 32, 4)
    assert tiny_model_config(feed_forward=False).inner_width == 0
    assert tiny_model_config(feed_forward="swiglu").inner_width == 88  # 8/3 · 32, up to a multiple of 8
    assert config.window(0) is None and not config.has_value_embedding(0)


def test_a_window_that_hides_nothing_is_warned_of():
    assert not tiny_model_config(sliding_window=15).warnings()
    assert "sliding_window=16 is not less than context_length=16" in tiny_model_config(sliding_window=16).warnings()[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("beta2", 0.99999999), ("weight_decay", 1e39), ("weight_decay", 1e-60), ("learning_rate", 1e-60)),
        *(("drop_rate", 0.99999999), ("drop_rate", 1e-60), ("clipping_max_norm", 1e-60)),
    ],
)
def test_a_number_that_float32_makes_another_of_is_refused(name, value, complaint_about):
    line = complaint_about(changed(**{name: value}))
    assert line.startswith(f"{name}: expected a number that float32 can hold, got {value!r}")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("beta2", 0.9999999),
            ("beta2", 0.0),
            ("weight_decay", 1e38),
            ("weight_decay", 1.0),
            ("learning_rate", 1e-30),
        ),
        *(("clipping_max_norm", value) for value in (1e9, 1e38, 1e40, 1e300, 1.0, None)),
    ],
)
def test_a_number_that_float32_can_take_is_taken(name, value):
    assert getattr(parse_config(changed(**{name: value}), TrainConfig, "train.json"), name) == value


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_have_are_refused(number, complaint_about):
    text = changed()[:-1] + f', "weight_decay": {number}}}'
    assert complaint_about(text) == f"{number} is not JSON; write a finite number"


def test_a_number_that_overflows_is_refused(complaint_about):
    assert "finite" in complaint_about(changed()[:-1] + ', "weight_decay": 1e999}')


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"seed": 1, "seed": 2}', "duplicate key 'seed'; keep one"),
        ('{"mesh": {"data": 1, "data": 1}}', "duplicate key 'data'; keep one"),
        ("", "not JSON: Expecting value at line 1, column 1"),
        ('{\n"seed": 1,\n}', "not JSON: "),
        ("{'seed': 1}", "not JSON: "),
        (changed() + "x", "not JSON: Extra data"),
        ("[]", "expected a JSON object {…}, got an array"),
        ("7", "expected a JSON object {…}, got a number"),
        ("7.5", "expected a JSON object {…}, got a number"),
        ("null", "expected a JSON object {…}, got null"),
        ("true", "expected a JSON object {…}, got true or false"),
        ('"seed"', "expected a JSON object {…}, got a string"),
        (changed().encode("utf-8-sig"), "starts with a byte order mark (BOM); save it as plain UTF-8"),
        (b'{"dataset": "\xff"}', "expected UTF-8 text, got other bytes at position 13"),
        (changed().encode("utf-16"), "expected UTF-8 text, got other bytes at position 0"),
        (" " * 1_000_001, "expected a config of a few lines, got 1,000,001 bytes"),
        ("[" * 100_000, "nested too deeply"),
        ('{"mesh": ' * 100_000, "nested too deeply"),
        (changed()[:-1] + ', "seed": 1' + "0" * 5000 + "}", "Exceeds the limit"),
        (changed(**{"a\nb": 1}), r"unknown key 'a\nb'"),
        (changed(sample_prompt="\ud800"), "sample_prompt: expected "),
        (changed(microbatch_size=[1] * 500), "microbatch_size: expected "),
    ],
    ids=lambda value: None if isinstance(value, str) and len(value) < 40 else "content",
)
def test_a_file_that_is_no_config_is_refused(content, line, complaint_about):
    said = complaint_about(content)
    assert said.startswith(line)
    assert len(said) < 1000


@pytest.mark.parametrize("depth", [10, 400, 800, 900, 950, 980, 1000, 5000])
def test_no_depth_of_nesting_gets_past_the_check(depth, complaint_about):
    complaint_about(changed()[:-1] + ', "seed": ' + "[" * depth + "]" * depth + "}")


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda path: None, "expected a JSON file, found nothing"),
        (lambda path: path.mkdir(), "expected a JSON file, got a folder"),
    ],
    ids=["missing", "folder"],
)
def test_a_config_that_is_no_file_is_refused(make, line, tmp_path):
    path = tmp_path / "train.json"
    make(path)
    assert complaint(path, TrainConfig).startswith(line)


def test_a_config_below_a_file_is_refused(tmp_path):
    (tmp_path / "run").touch()
    complaint(tmp_path / "run" / "train.json", TrainConfig)


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({"emb_dim": 32, "n_heads": 4}, False),
        ({"emb_dim": 36, "n_heads": 4}, True),
        ({"emb_dim": 128, "n_heads": 1}, False),
        ({"emb_dim": 136, "n_heads": 1}, True),
        ({"emb_dim": 136, "n_heads": 1, "n_layers": 0}, False),
    ],
)
def test_a_head_width_that_a_gpu_is_slow_at_is_warned_of(changes, warned):
    lines = tiny_model_config(**changes).warnings()
    assert len(lines) == warned
    assert all(f"head width {changes['emb_dim'] // changes['n_heads']} " in line for line in lines)


@pytest.mark.parametrize("config_class", [ModelConfig, TrainConfig])
def test_the_docs_say_of_every_key_what_the_schema_says(config_class):
    lines = (ROOT / "docs" / "running.md").read_text().replace("`", "").splitlines()
    rows = {cells[1]: cells[2:-1] for line in lines if len(cells := [cell.strip() for cell in line.split("|")]) > 4}
    for name, field in config_class.leaves().items():
        default, *on_resume, meaning = rows[name]
        value = ... if default == "required" else default.replace(",", "") if default[0].isdigit() else default
        assert value == (... if field.is_required() else default_of(field)), name
        assert meaning == field.description
        assert on_resume == ([field.json_schema_extra["on_resume"]] if config_class is TrainConfig else [])


def default_of(field):
    return f"{field.default:g}" if type(field.default) is float else json.dumps(field.default)
