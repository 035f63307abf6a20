"""Files that somebody made to do harm, or that a disk has spoilt: refused in one line, at little cost.

First what is hostile by name, then what needs a limit on memory, then more than 2,000 malformed inputs by Hypothesis.
"""

import functools
import io
import json
import math
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import optax
import pytest
from flax import nnx
from helpers import ROOT, TINY_MODEL, TINY_TRAIN, VOCAB_SIZE, random_tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import checkpointing
from checkpointing import Checkpoint, copy_to_host, select_checkpoint, verify
from model import create_model
from outside_in.config import ModelConfig, TrainConfig
from outside_in.config_files import load_config
from outside_in.data.loader import load_tokens
from outside_in.inference import load
from outside_in.inference.load import load_saved_model
from outside_in.storage import metrics
from outside_in.storage.safetensors_file import MAX_HEADER_BYTES
from outside_in.storage.strict_json import MAX_BYTES
from outside_in.weights import load_model, named_arrays

pytestmark = pytest.mark.slow

NAME = "20261121T093000Z-iteration-7"
META = {"global_step": 7, "is_best": True, "seconds_trained": 1.5}
SHAPE = {"vocab_size": 11, "context_length": 4, "emb_dim": 4, "n_heads": 2, "n_layers": 1, "qkv_bias": False}
DTYPES = ["BOOL", "F4", "F8_E5M2", "I8", "U16", "F16", "BF16", "I32", "U32", "C64", "F64", "I64", "U64", "float32"]


def line_of(path, function, *arguments):
    """The one line with which a call must refuse a file: it names the file and has no control characters."""
    with pytest.raises(ValueError) as caught:
        function(*arguments)
    return checked_line(caught.value, path)


def checked_line(error, path):
    line = str(error)
    assert type(error) is ValueError, repr(error)
    assert line.startswith(str(path)) and line.isprintable() and len(line) < 1500, line
    return line


def packed(header, content=b"", header_length=None):
    """The bytes of a safetensors file with any header, true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if header_length is None else header_length) + text + content


def unpacked(everything):
    """The header of a safetensors file, and its content."""
    [length] = struct.unpack("<Q", everything[:8])
    return json.loads(everything[8 : 8 + length]), everything[8 + length :]


def arrays_of(*modules):
    return [array for module in modules for array in named_arrays(nnx.state(module)).values()]


def bits(*modules):
    return [(str(array.dtype), array.shape, np.asarray(array).tobytes()) for array in arrays_of(*modules)]


@pytest.fixture(scope="module")
def trained():
    """A model and its optimizer, which no hostile file may change."""
    model = create_model(ModelConfig(**SHAPE), seed=3)
    return model, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)


@pytest.fixture(scope="module")
def template(trained, tmp_path_factory):
    """The content of every file of a good checkpoint."""
    folder, text = tmp_path_factory.mktemp("run"), trained[0].config.model_dump_json()
    saved = checkpointing.save(folder, copy_to_host(*trained), META, text).path
    return {str(path.relative_to(saved)): path.read_bytes() for path in saved.rglob("*") if path.is_file()}


@pytest.fixture
def checkpoint(template, tmp_path):
    folder = tmp_path / NAME
    for name, content in template.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return Checkpoint(folder)


@pytest.fixture
def weights(checkpoint):
    return checkpoint.path / "model.safetensors"


@pytest.fixture(autouse=True)
def traced_once(monkeypatch):
    """Trace a model once, not for every file."""
    traced = functools.cache(load.abstract_model)
    monkeypatch.setattr(load, "abstract_model", lambda config: nnx.clone(traced(config)))


def test_the_good_files_are_good(template, checkpoint, weights, trained):
    verify(checkpoint)
    assert checkpoint.meta == META
    assert bits(load_saved_model(weights)) == bits(trained[0])
    load_model(weights, trained[0])
    assert packed(*unpacked(template["model.safetensors"])) == packed(*unpacked(weights.read_bytes()))


# Weights files: every case makes a file from the header and the content of a good one


def entry(name, **lies):
    return lambda header, content: packed(header | {name: header[name] | lies}, content)


def unknown(name, count=1):
    nothing = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    more = {f"{name}{number}" if count > 1 else name: nothing for number in range(count)}
    return lambda header, content: packed(header | more, content)


def renamed(old, new):
    return lambda header, content: packed({new if name == old else name: header[name] for name in header}, content)


def cast(dtype, size):
    """All arrays in another type, in a file that is true to itself."""

    def change(header, _):
        position, entries = 0, {"__metadata__": header["__metadata__"]}
        for name, array in header.items():
            if name != "__metadata__":
                end = position + math.prod(array["shape"]) * size
                entries[name] = {"dtype": dtype, "shape": array["shape"], "data_offsets": [position, end]}
                position = end
        return packed(entries, bytes(position))

    return change


def last_value(value):
    def change(header, content):
        _, end = header["output_norm.bias"]["data_offsets"]
        return packed(header, content[: end - 4] + struct.pack("<f", value) + content[end:])

    return change


def header_only(text, length=None):
    return lambda header, content: packed(text, content, length)


def archive():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("archive/data.pkl", pickle.dumps([1, 2]))
    return file.getvalue()


def npz():
    file = io.BytesIO()
    np.savez(file, a=np.zeros(3))
    return file.getvalue()


UNREADABLE = "not a readable safetensors file"
TABLE, BIAS, SCALE = "token_embedding.embedding", "output_norm.bias", "output_norm.scale"
WEIGHTS = {
    "an empty file": (lambda *_: b"", UNREADABLE),
    "seven bytes": (lambda *_: b"\0" * 7, UNREADABLE),
    "a header cut off": (lambda *good: packed(*good)[:100], UNREADABLE),
    "no header": (header_only(b""), UNREADABLE),
    "a header longer than the file": (lambda *good: packed(*good, header_length=100_000), UNREADABLE),
    "a header of exabytes": (lambda *good: packed(*good, header_length=2**63), "header is too large"),
    "a header of all ones": (lambda *good: packed(*good, header_length=2**64 - 1), "header is too large"),
    "a header above the limit": (lambda *_: packed(b"{}".ljust(MAX_HEADER_BYTES + 1)), "header is too large"),
    "a header that is a list": (header_only(b"[]"), UNREADABLE),
    "a header that is no text": (header_only(b"\xff\xfe{}"), UNREADABLE),
    "a header of 100 levels": (header_only(b'{"a":' * 100 + b"1" + b"}" * 100), UNREADABLE),
    "a header of 100,000 levels": (header_only(b'{"a":' * 100_000), UNREADABLE),
    "two headers": (lambda *good: packed(packed(*good), b""), UNREADABLE),
    "content cut off": (lambda *good: packed(*good)[:-1], UNREADABLE),
    "content too long": (lambda *good: packed(*good) + b"\0", UNREADABLE),
    "offsets that overlap": (
        lambda header, content: entry(BIAS, data_offsets=header[SCALE]["data_offsets"])(header, content),
        UNREADABLE,
    ),
    "offsets that go backwards": (entry(BIAS, data_offsets=[16, 0]), UNREADABLE),
    "offsets beyond the file": (entry(BIAS, data_offsets=[2**40, 2**40 + 16]), UNREADABLE),
    "offsets beyond all numbers": (entry(BIAS, data_offsets=[2**64, 2**64 + 16]), UNREADABLE),
    "negative offsets": (entry(BIAS, data_offsets=[-16, 0]), UNREADABLE),
    "bad offsets of a name with a line break": (
        lambda header, content: packed(header | {"a\nb": header[BIAS] | {"data_offsets": [4, 8]}}, content),
        r"a\nb",
    ),
    "a shape turned": (entry(TABLE, shape=[4, 11]), "expected float32[11, 4], got float32[4, 11]"),
    "a shape flattened": (entry(TABLE, shape=[44]), "expected float32[11, 4], got float32[44]"),
    "a shape with a thousand ones": (entry(TABLE, shape=[11, 4] + [1] * 1000), "expected float32[11, 4], got float32["),
    "a shape larger than its content": (entry(TABLE, shape=[11, 5]), UNREADABLE),
    "a shape beyond all numbers": (entry(TABLE, shape=[2**63, 2**63]), UNREADABLE),
    "a negative shape": (entry(TABLE, shape=[-11, -4]), UNREADABLE),
    "a type of another size": (entry(TABLE, dtype="F64"), UNREADABLE),
    "a type that is none": (entry(TABLE, dtype="F32\nF32"), UNREADABLE),
    "integers": (entry(TABLE, dtype="I32"), "expected float32[11, 4], got int32[11, 4]"),
    "half precision": (cast("F16", 2), "got float16["),
    "brain floats": (cast("BF16", 2), "got bfloat16["),
    "double precision": (cast("F64", 8), "got float64["),
    "eight bits": (cast("F8_E4M3", 1), "got F8_E4M3["),
    "complex numbers": (cast("C64", 8), "got C64["),
    "a name misspelt": (renamed(TABLE, "embedding"), f"lacks 1 arrays that the model has, such as {TABLE}"),
    "an unknown array": (unknown("more"), "has 1 arrays that the model lacks, such as 'more'"),
    "an unknown name with a line break": (unknown("a\nerror: b"), r"'a\nerror: b'"),
    "an unknown name that clears the screen": (unknown("\x1b[2J"), r"'\x1b[2J'"),
    "an unknown name of a megabyte": (unknown("a" * 10**6), "has 1 arrays"),
    "thousands of unknown arrays": (unknown("more.", count=5000), "has 5000 arrays that the model lacks"),
    "NaN": (last_value(math.nan), f"{BIAS}: expected finite numbers"),
    "infinity": (last_value(math.inf), f"{BIAS}: expected finite numbers"),
    "minus infinity": (last_value(-math.inf), f"{BIAS}: expected finite numbers"),
    **{f"a pickle of protocol {n}": (lambda *_, n=n: pickle.dumps(SHAPE, n), UNREADABLE) for n in range(6)},
    "a PyTorch archive": (lambda *_: archive(), UNREADABLE),
    "NumPy arrays": (lambda *_: npz(), UNREADABLE),
    "a web page": (lambda *_: b"<!DOCTYPE html>\n<html><body>404</body></html>", UNREADABLE),
    "a pointer of Git LFS": (lambda *_: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", UNREADABLE),
    "text": (lambda *_: b"\n" * 1000, UNREADABLE),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_hostile_weights_file_is_refused_by_every_reader_and_changes_nothing(
    kind, template, trained, checkpoint, weights
):
    change, complaint = WEIGHTS[kind]
    weights.write_bytes(change(*unpacked(template["model.safetensors"])))
    before = bits(*trained)
    for reader, *arguments in (
        (load_saved_model, weights),
        (load_model, weights, trained[0]),
        (checkpointing.load, checkpoint, *trained),
    ):
        assert complaint in line_of(weights, reader, *arguments)
    assert bits(*trained) == before


def shape(**changes):
    return json.dumps(SHAPE | changes)


FIRST = "blocks.0.attention.output.bias"  # of the arrays, in the order in which they are compared
MODEL_JSONS = {
    "100 levels": (shape(emb_dim="deep").replace('"deep"', "[" * 100 + "]" * 100), "nested too deeply"),
    "a list of 100 levels": ("[" * 100 + "]" * 100, "nested too deeply"),
    "a few levels": (shape(emb_dim=[[[4]]]), "emb_dim: expected a valid integer, got [[[4]]]"),
    "100,000 levels": ("[" * 100_000, "nested too deeply"),
    "100,000 objects": ('{"a":' * 100_000, "nested too deeply"),
    "too long": (shape().ljust(MAX_BYTES + 1), "expected a model.json of a few lines"),
    "a key of half a megabyte": (shape(**{"a\n" * 250_000: 1}), "unknown key"),
    "a key twice": (shape()[:-1] + ', "emb_dim": 4}', "duplicate key 'emb_dim'"),
    "a width that is no number": (shape().replace('"emb_dim": 4', '"emb_dim": NaN'), "NaN is not JSON"),
    "a width of 4,000 digits": (shape(emb_dim=10**3999), f"{FIRST}: expected float32[1000"),
    "a width of 4,000 digits that no heads divide": (shape(emb_dim=10**3999 + 1), "emb_dim=1000"),
    "a width of 5,000 digits": (shape().replace('"emb_dim": 4', '"emb_dim": ' + "4" * 5000), "Exceeds the limit"),
    "a gigantic width": (shape(emb_dim=10**9), f"{FIRST}: expected float32[1000000000], got float32[4]"),
    "a million layers": (shape(n_layers=10**6), "n_layers: expected less than or equal to 1000, got 1000000"),
    "a thousand layers": (shape(n_layers=10**3), "more layers than the file has arrays, 16"),
    "layers of 4,000 digits": (shape(n_layers=10**3999), "n_layers: expected less than or equal to 1000"),
    "a gigantic width and a thousand layers": (shape(emb_dim=10**9, n_layers=10**3), "more layers than"),
    "a gigantic context": (shape(context_length=10**12), "position_embedding.embedding: expected"),
    "a layer too many": (shape(n_layers=2), "lacks 11 arrays that the model has, such as blocks.1."),
    "a layer too few": (shape(n_layers=0), f"has 11 arrays that the model lacks, such as '{FIRST}'"),
    "another vocabulary": (shape(vocab_size=12), "head.embedding: expected float32[12, 4], got float32[11, 4]"),
}


@pytest.mark.parametrize("kind", MODEL_JSONS)
def test_a_hostile_model_json_in_a_weights_file_is_refused(kind, template, weights):
    text, complaint = MODEL_JSONS[kind]
    header, content = unpacked(template["model.safetensors"])
    weights.write_bytes(packed(header | {"__metadata__": {"model.json": text}}, content))
    assert complaint in line_of(weights, load_saved_model, weights)


def test_a_model_that_does_not_fit_into_memory_is_refused(weights, monkeypatch):
    monkeypatch.setattr(load, "memory_bytes", lambda: weights.stat().st_size)
    load_saved_model(weights)
    monkeypatch.setattr(load, "memory_bytes", lambda: weights.stat().st_size - 1)
    assert "this machine's memory" in line_of(weights, load_saved_model, weights)


# JSON files


def manifest_of(checkpoint):
    return json.loads((checkpoint.path / "manifest.json").read_bytes())


JSON_READERS = {
    "model.json": lambda path: load_config(path, ModelConfig),
    "train.json": lambda path: load_config(path, TrainConfig),
    "meta.json": lambda path: Checkpoint(path.parent).meta,
    "manifest.json": lambda path: verify(Checkpoint(path.parent)),
}
GOOD_JSON = {"model.json": TINY_MODEL, "train.json": TINY_TRAIN | {"dataset": "any"}, "meta.json": META}
JSONS = {
    "nothing": b"",
    "zeros": bytes(1000),
    "a list": b"[]",
    "null": b"null",
    "a string": b'"global_step"',
    "a list of 100 levels": b"[" * 100 + b"]" * 100,
    "an object of 100 levels": b'{"mesh":' * 100 + b"7" + b"}" * 100,
    "a list of 100,000 levels": b"[" * 100_000 + b"]" * 100_000,
    "an object of 100,000 levels": b'{"mesh":' * 100_000 + b"7" + b"}" * 100_000,
    "one byte above the limit": b"{}".ljust(MAX_BYTES + 1),
    "a key twice": b'{"global_step": 7, "global_step": 7}',
    "a long key twice": b"{" + b'"%s": 7, ' % (b"k" * 5000) * 2 + b'"a": 7}',
    "not a number": b'{"global_step": NaN}',
    "a number of 5,000 digits": b'{"global_step": ' + b"7" * 5000 + b"}",
    "an infinite number": b'{"global_step": 1e999}',
    "bytes that are no text": b'{"global_step": "\xff"}',
    "UTF-16": '{"global_step": 7}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"global_step": 7}',
    "half a file": b'{"global_step": 7, "is_b',
    "a line break in a key": b'{"a\\nerror: b": {}, "global_step": 8}',
    "a pickle": pickle.dumps(META),
}


@pytest.mark.parametrize("kind", JSONS)
@pytest.mark.parametrize("name", JSON_READERS)
def test_hostile_json_is_refused(name, kind, checkpoint):
    path = checkpoint.path / name
    path.write_bytes(JSONS[kind])
    line_of(checkpoint.path, JSON_READERS[name], path)


@pytest.mark.parametrize("name", JSON_READERS)
def test_a_json_file_of_100_megabytes_is_refused_without_reading_it(name, checkpoint):
    path = checkpoint.path / name
    path.write_bytes(b"[" * 10_000)
    os.truncate(path, 100_000_000)
    tracemalloc.start()
    try:
        assert "100,000,000 bytes" in line_of(path, JSON_READERS[name], path)
        assert tracemalloc.get_traced_memory()[1] < 10 * MAX_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", JSON_READERS)
def test_a_json_file_that_cannot_be_read_is_refused(name, checkpoint):
    path = checkpoint.path / name
    path.unlink(missing_ok=True)
    assert "found nothing" in line_of(path, JSON_READERS[name], path)
    path.mkdir()
    assert "got a folder" in line_of(path, JSON_READERS[name], path)


@pytest.mark.parametrize("step", [8, "7", None, [7], {"7": 7}])
def test_a_meta_file_of_another_step_than_its_folder_says_is_refused(step, checkpoint):
    path = checkpoint.path / "meta.json"
    path.write_text(json.dumps(META | {"global_step": step}))
    assert "expected global_step 7" in line_of(path, lambda: checkpoint.meta)
    assert not checkpoint.is_best


def test_a_train_json_whose_numbers_have_no_end_is_refused_at_once(tmp_path):
    path = tmp_path / "train.json"
    sizes = {"gradient_accumulation_steps": 10**15, "microbatches_per_call": 7}
    path.write_text(json.dumps(GOOD_JSON["train.json"] | sizes))
    line = line_of(path, load_config, path, TrainConfig)
    assert "use one of 1, 2, 4, 5, 8, " in line and line.endswith(" 1000")


# Folders of checkpoints


@pytest.mark.parametrize("absolute", [False, True])
def test_a_file_of_a_checkpoint_that_is_a_link_is_refused(absolute, checkpoint, template, tmp_path):
    for name in template:
        path, elsewhere = checkpoint.path / name, tmp_path / "elsewhere"
        path.rename(elsewhere)
        path.symlink_to(elsewhere if absolute else os.path.relpath(elsewhere, path.parent))
        assert "is a link" in line_of(path, verify, checkpoint)
        path.unlink()
        elsewhere.rename(path)
    verify(checkpoint)


@pytest.mark.parametrize("target", ["nowhere", ".", "..", "/", "meta.json", "link"])
def test_a_link_too_many_in_a_checkpoint_is_refused(target, checkpoint):
    for folder in (checkpoint.path, checkpoint.path / "optimizer"):
        (folder / "link").symlink_to(target)
        assert "is a link" in line_of(folder / "link", verify, checkpoint)
        (folder / "link").unlink()


def test_a_folder_of_a_checkpoint_that_is_a_link_is_refused(checkpoint, tmp_path):
    (checkpoint.path / "optimizer").rename(tmp_path / "elsewhere")
    (checkpoint.path / "optimizer").symlink_to(tmp_path / "elsewhere")
    assert "is a link" in line_of(checkpoint.path / "optimizer", verify, checkpoint)


@pytest.mark.parametrize("name", [b"a\nerror: b", b"\x1b[2J", b"\xff", "\u202e".encode(), "\u2028".encode()])
def test_a_file_name_that_would_spoil_the_line_is_refused(name, checkpoint):
    try:
        (checkpoint.path / os.fsdecode(name)).touch()
    except OSError:
        pytest.skip("this file system does not have such names")
    assert "printable file names" in line_of(checkpoint.path, verify, checkpoint)


@pytest.mark.parametrize(
    "name",
    ["../secret", "../../secret", "/etc/passwd", "", ".", "./meta.json", "a\nb", "a\0b", "a" * 5000, "../" * 300],
)
def test_a_manifest_cannot_name_a_file_elsewhere(name, checkpoint, tmp_path):
    (tmp_path / "secret").write_text("secret")
    manifest = manifest_of(checkpoint)
    (checkpoint.path / "manifest.json").write_text(json.dumps(manifest | {name: manifest["meta.json"]}))
    line = line_of("", verify, checkpoint)
    assert "missing" in line or "printable file names" in line


@pytest.mark.parametrize("entries", [None, 7, "size", [], {}, {"size": 7}, {"sha256": "7"}, [["size", "sha256"]]])
def test_a_manifest_of_another_form_is_refused(entries, checkpoint):
    path = checkpoint.path / "manifest.json"
    path.write_text(json.dumps(manifest_of(checkpoint) | {"meta.json": entries}))
    assert "expected size and sha256" in line_of(path, verify, checkpoint)


@pytest.mark.parametrize("size", [None, "", -1, 1.5, 10**400, [], {"a": 1}])
def test_a_manifest_with_other_sizes_is_refused(size, checkpoint):
    manifest = manifest_of(checkpoint)
    manifest["meta.json"]["size"] = size
    (checkpoint.path / "manifest.json").write_text(json.dumps(manifest))
    assert "content differs" in line_of(checkpoint.path / "meta.json", verify, checkpoint)


def test_a_checkpoint_of_a_thousand_folders_in_each_other_is_refused(checkpoint):
    home, folder = os.open(".", os.O_RDONLY), checkpoint.path
    try:
        os.chdir(folder)
        for _ in range(1200):  # more than Python's limit of recursion
            Path("d").mkdir()
            os.chdir("d")
        os.close(os.open("file", os.O_CREAT))
        os.fchdir(home)
        line_of(checkpoint.path, verify, checkpoint)
    finally:
        os.fchdir(home)
        os.close(home)
        subprocess.run(["rm", "-rf", folder / "d"], check=True)  # shutil gives up as well


HOSTILE_NAMES = [
    f"../{NAME}",
    f"{NAME}/../{NAME}",
    f"./{NAME}",
    f"{NAME}/",
    "..",
    "/",
    "",
    "\0",
    "a\nb",
    "\x1b[2J",
    "~",
]


@pytest.mark.parametrize("which", [*HOSTILE_NAMES, f"/{NAME}", "a" * 900, NAME + " ", NAME[:-1] + "٧"])
def test_a_checkpoint_goes_by_its_own_name_alone(which, checkpoint):
    folder = checkpoint.path.parent
    assert select_checkpoint(folder, NAME) == checkpoint
    assert "no checkpoint" in line_of(folder, select_checkpoint, folder, which)


@pytest.mark.parametrize("name", ["20261399T093000Z-iteration-9", "２０２６１２２１T093000Z-iteration-9"])
def test_a_name_that_is_no_time_is_no_checkpoints(name, checkpoint, trained, tmp_path):
    (tmp_path / name).mkdir()
    assert select_checkpoint(tmp_path, None) == checkpoint
    saved = checkpointing.save(tmp_path, copy_to_host(*trained), META | {"global_step": 8}, "{}")
    assert select_checkpoint(tmp_path, None) == saved
    assert (tmp_path / name).is_dir()


def test_optimizer_state_of_another_form_is_refused_before_it_is_loaded(checkpoint, trained, monkeypatch):
    monkeypatch.setattr(checkpointing, "_load_optimizer", lambda _: pytest.fail("loaded"))
    model = create_model(ModelConfig(**SHAPE), seed=3)
    other = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    line_of(checkpoint.path / "optimizer", checkpointing.load, checkpoint, model, other)


# Token files


def tokens_header(**lies):
    return {"tokens": {"dtype": "U16", "shape": [100], "data_offsets": [0, 200]} | lies}


TOKENS = {
    "an empty file": (b"", UNREADABLE),
    "a header cut off": (packed(tokens_header())[:30], UNREADABLE),
    "a header of exabytes": (packed(tokens_header(), bytes(200), 2**63), "header is too large"),
    "a header above the limit": (packed(b"{}".ljust(MAX_HEADER_BYTES + 1)), "header is too large"),
    "a header of 100,000 levels": (packed(b'{"tokens":' * 100_000), UNREADABLE),
    "content cut off": (packed(tokens_header(), bytes(199)), UNREADABLE),
    "offsets that overlap": (packed(tokens_header() | {"a": tokens_header()["tokens"]}, bytes(200)), UNREADABLE),
    "bad offsets of a name with a line break": (
        packed(tokens_header() | {"a\nb": {"dtype": "U8", "shape": [1], "data_offsets": [7, 8]}}, bytes(200)),
        r"a\nb",
    ),
    "a shape larger than its content": (packed(tokens_header(shape=[10**12]), bytes(200)), UNREADABLE),
    "two dimensions": (packed(tokens_header(shape=[10, 10]), bytes(200)), "one-dimensional"),
    "no dimension": (packed(tokens_header(shape=[], data_offsets=[0, 2]), bytes(2)), "one-dimensional"),
    "a thousand dimensions": (packed(tokens_header(shape=[100] + [1] * 1000), bytes(200)), "one-dimensional"),
    "floats": (packed(tokens_header(dtype="F16"), bytes(200)), "of F16"),
    "truth values": (packed(tokens_header(dtype="BOOL", shape=[200]), bytes(200)), "of BOOL"),
    "no tokens": (packed(tokens_header(shape=[0], data_offsets=[0, 0])), "expected at least 1 tokens, got 0"),
    "another name": (packed({"ids": tokens_header()["tokens"]}, bytes(200)), "got ids"),
    "a name with a line break": (packed({"a\nb": tokens_header()["tokens"]}, bytes(200)), r"got a\nb"),
    "names of a megabyte": (packed({"a" * 10**6: tokens_header()["tokens"]}, bytes(200)), "got aaa"),
    "ids beyond the vocabulary": (packed(tokens_header(), b"\xff" * 200), "token 0 is id 65535"),
    "negative ids": (packed(tokens_header(dtype="I16"), b"\xff" * 200), "token 0 is id -1"),
    "ids of 64 bits": (packed(tokens_header(dtype="U64", shape=[25]), b"\xff" * 200), f"is id {2**64 - 1}"),
    "a pickle": (pickle.dumps(np.zeros(100, np.uint16)), UNREADABLE),
    "a PyTorch archive": (archive(), UNREADABLE),
}


@pytest.mark.parametrize("kind", TOKENS)
def test_a_hostile_token_file_is_refused(kind, tmp_path):
    path = tmp_path / "train.safetensors"
    content, complaint = TOKENS[kind]
    path.write_bytes(content)
    assert complaint in line_of(path, load_tokens, path, VOCAB_SIZE)


def test_tokens_that_do_not_fit_into_memory_are_refused_and_a_part_of_them_is_not(tmp_path, monkeypatch):
    path = tmp_path / "train.safetensors"
    path.write_bytes(packed(tokens_header(), bytes(200)))
    monkeypatch.setattr("outside_in.data.token_files.memory_bytes", lambda: 100)
    assert load_tokens(path, VOCAB_SIZE, 10, 20).size == 20
    assert "this machine's memory" in line_of(path, load_tokens, path, VOCAB_SIZE)


# What would take memory, or wait forever: in a process of its own that may take no more than 400 MB

READ_WITH_LITTLE_MEMORY = """
import json, resource, sys
from pathlib import Path
import checkpointing
from checkpointing import Checkpoint, verify
from outside_in.config import ModelConfig, TrainConfig
from outside_in.config_files import load_config
from outside_in.data.loader import load_tokens
from outside_in.inference.load import load_saved_model
from outside_in.weights import load_model

model = load_saved_model(Path(sys.argv[1]))
READERS = {
    "saved model": load_saved_model,
    "model": lambda path: load_model(path, model),
    "checkpoint": lambda path: checkpointing.load(Checkpoint(path.parent), model, None),
    "tokens": lambda path: load_tokens(path, 101),
    "model.json": lambda path: load_config(path, ModelConfig),
    "train.json": lambda path: load_config(path, TrainConfig),
    "meta.json": lambda path: Checkpoint(path.parent).meta,
    "verify": lambda path: verify(Checkpoint(path.parent)),
}
status = Path("/proc/self/status")
if status.exists():
    [used] = [int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmData")]
    resource.setrlimit(resource.RLIMIT_DATA, (used + 400_000_000, resource.RLIM_INFINITY))
for reader, path in json.loads(sys.argv[2]):
    try:
        READERS[reader](Path(path))
        print("took it")
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
"""
TERABYTE, ENTRY = 10**12, {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}


def holes(length, start=b""):
    """A file of this length with nothing but a start on the disk."""

    def make(path):
        path.write_bytes(start)
        os.truncate(path, length)

    return make


def huge_table(vocab_size, emb_dim):
    """A weights file as training would save it, of a model that is one table, but with nothing on the disk."""

    def make(path):
        off = dict.fromkeys(["output_norm", "position_embedding"], False)
        table = {"vocab_size": vocab_size, "emb_dim": emb_dim, "n_layers": 0, "tied_head": True}
        end = 4 * vocab_size * emb_dim
        entry = {"dtype": "F32", "shape": [vocab_size, emb_dim], "data_offsets": [0, end]}
        start = packed({"__metadata__": {"model.json": json.dumps(SHAPE | off | table)}, TABLE: entry})
        holes(len(start) + end, start)(path)

    return make


def with_metadata(**changes):
    return lambda path: path.write_bytes(packed({"__metadata__": {"model.json": shape(**changes)}, "a": ENTRY}))


def a_terabyte_more(path):
    header, content = unpacked(path.read_bytes())
    end = len(content)
    header["more"] = {"dtype": "U8", "shape": [TERABYTE], "data_offsets": [end, end + TERABYTE]}
    start = packed(header, content)
    holes(len(start) + TERABYTE, start)(path)


def half_a_million_arrays(path):
    nothing = json.dumps(ENTRY).encode()
    path.write_bytes(packed(b"{" + b",".join(b'"%d": %b' % (number, nothing) for number in range(500_000)) + b"}"))


def huge_tokens(path):
    start = packed(tokens_header(shape=[4 * TERABYTE], data_offsets=[0, 8 * TERABYTE]))
    holes(len(start) + 8 * TERABYTE, start)(path)


def listed_pipe(path):
    os.mkfifo(path)
    manifest = json.loads((path.parent / "manifest.json").read_bytes())
    (path.parent / "manifest.json").write_text(json.dumps(manifest | {path.name: {"size": 0, "sha256": ""}}))


HUGE = {
    "a header of a terabyte": ("saved model", holes(2 * TERABYTE, struct.pack("<Q", TERABYTE)), "header is too large"),
    "half a million unknown arrays": ("saved model", half_a_million_arrays, "header is too large"),
    "a terabyte more than the model": ("model", a_terabyte_more, "that the model lacks, such as 'more'"),
    "a checkpoint with a terabyte more": ("checkpoint", a_terabyte_more, "that the model lacks, such as 'more'"),
    "a checkpoint of another size": ("checkpoint", huge_table(2**16, 2**20), "lacks 15 arrays"),
    "a model of eight terabytes": ("saved model", huge_table(2**16, 2**25), "this machine's memory"),
    "a model.json of a wide model": ("saved model", with_metadata(emb_dim=10**9), "lacks 16 arrays"),
    "a model.json of a deep model": (
        "saved model",
        with_metadata(n_layers=10**3),
        "more layers than the file has arrays, 1",
    ),
    "a terabyte of zeros": ("saved model", holes(TERABYTE), UNREADABLE),
    "tokens of eight terabytes": ("tokens", huge_tokens, "this machine's memory"),
    "half a million arrays that are no tokens": ("tokens", half_a_million_arrays, "header is too large"),
    "a terabyte that is no tokens": ("tokens", holes(TERABYTE), UNREADABLE),
    "a model.json of a terabyte": ("model.json", holes(TERABYTE, b"{"), "1,000,000,000,000 bytes"),
    "a train.json of a terabyte": ("train.json", holes(TERABYTE, b"{"), "1,000,000,000,000 bytes"),
    "a meta.json of a terabyte": ("meta.json", holes(TERABYTE, b"{"), "1,000,000,000,000 bytes"),
    "a manifest.json of a terabyte": ("verify", holes(TERABYTE, b"{"), "1,000,000,000,000 bytes"),
    "a train.json that is a pipe": ("train.json", os.mkfifo, "a device"),
    "a train.json that has no end": ("train.json", lambda path: path.symlink_to("/dev/zero"), "a device"),
    "a meta.json that is a pipe": ("meta.json", lambda path: (path.unlink(), os.mkfifo(path)), "a device"),
    "a checkpoint with a pipe": ("verify", listed_pipe, "a device"),
    "a checkpoint's weights of a terabyte": ("verify", holes(TERABYTE), "content differs"),
}
FILE_NAMES = {"a manifest.json of a terabyte": "manifest.json", "a checkpoint with a pipe": "pipe"}


def test_what_is_huge_or_endless_is_refused_in_little_memory(template, tmp_path):
    jobs = []
    for number, (kind, (reader, make, _)) in enumerate(HUGE.items()):
        folder = tmp_path / str(number) / NAME
        for name, content in template.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        path = folder / FILE_NAMES.get(kind, reader if reader.endswith(".json") else "model.safetensors")
        make(path)
        jobs.append((reader, str(path)))
    good = tmp_path / "good.safetensors"
    good.write_bytes(template["model.safetensors"])
    command = [sys.executable, "-c", READ_WITH_LITTLE_MEMORY, str(good), json.dumps(jobs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for (kind, (_, _, complaint)), (_, path), line in zip(HUGE.items(), jobs, done.stdout.splitlines(), strict=True):
        assert line.startswith(f"ValueError: {path}: ") and complaint in line, (kind, line)


# Hypothesis: for every target, how many inputs are tried, and how many different ones of them are refused at least

ATTEMPTS = {
    "weights, damaged": (260, 210),
    "weights, with a lying header": (340, 210),
    "weights of a checkpoint": (240, 160),
    "model.json in weights": (280, 205),
    "model.json": (260, 200),
    "train.json": (280, 205),
    "meta.json": (220, 90),
    "manifest.json": (280, 220),
    "tokens": (420, 270),
    "metrics.jsonl": (240, 160),
    "name": (200, 190),
}


def test_more_than_2000_inputs_are_malformed():
    assert sum(malformed for _, malformed in ATTEMPTS.values()) > 2000


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
deep_json = st.builds(
    lambda opening, levels, closing: opening * levels + "7" + closing * levels,
    st.sampled_from(["[", '{"a":', '[{"mesh":', '{"emb_dim":']),
    st.integers(2, 5000),
    st.sampled_from(["", "]", "}", "}]"]),
)
sizes = st.integers(-3, 300) | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64 - 1, 2**64, 10**30])


@st.composite
def damaged(draw, good):
    """Good bytes with flipped bits, cut off, or with pieces taken out, doubled, or put in."""
    content = bytearray(good)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        match draw(st.sampled_from(["flip", "flip", "cut off", "take out", "double", "put in"])):
            case "flip" if at < len(content):
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "cut off":
                del content[at:]
            case "take out":
                del content[at : at + draw(st.integers(1, 9))]
            case "double":
                content[at:at] = content[at : at + draw(st.integers(1, 99))]
            case "put in":
                content[at : at + draw(st.integers(0, 9))] = draw(st.binary(min_size=1, max_size=9))
    return bytes(content)


@st.composite
def hostile_json(draw, good):
    """The text of an object with another value or key, of anything else, or of hardly any JSON at all."""
    key = draw(st.sampled_from(sorted(good)) | st.text(max_size=8))
    match draw(st.sampled_from(["damaged", "value", "value", "any", "deep", "deep value"])):
        case "damaged":
            return draw(damaged(json.dumps(good).encode()))
        case "value":
            return json.dumps(good | {key: draw(json_values)}).encode()
        case "any":
            return json.dumps(draw(json_values)).encode()
        case "deep":
            return draw(deep_json).encode()
        case "deep value":
            return json.dumps(good | {key: "deep"}).replace('"deep"', draw(deep_json)).encode()


@st.composite
def lying(draw, good):
    """A safetensors file whose header says something else than is there."""
    header, content = unpacked(good)
    names = [name for name in header if name != "__metadata__"]
    for _ in range(draw(st.integers(1, 2))):
        name, other, new = draw(st.sampled_from(names)), draw(st.sampled_from(names)), draw(st.text(max_size=8))
        true = unpacked(good)[0][name]
        match draw(st.sampled_from(["dtype", "shape", "turned", "offsets", "overlap", "more", "renamed", "any"])):
            case "dtype":
                header[name] = true | {"dtype": draw(st.sampled_from(DTYPES))}
            case "shape":
                header[name] = true | {"shape": draw(st.lists(sizes, max_size=4))}
            case "turned":
                header[name] = true | {"shape": [*true["shape"][::-1], 1]}
            case "offsets":
                header[name] = true | {"data_offsets": draw(st.lists(sizes, max_size=3))}
            case "overlap":
                header[name] = header.get(other)
            case "more":
                header[new] = ENTRY | {"shape": [0] * draw(st.integers(1, 99))}
            case "renamed":
                header[new] = header.pop(name, ENTRY)
            case "any":
                header[name] = draw(json_values)
    length = draw(st.sampled_from([None, None, None, 0, 7, 2**20, 2**63, 2**64 - 1]))
    return packed(header, content, length)


@pytest.fixture
def attempts(template, trained, checkpoint, weights, tmp_path):
    """For every target: the file, inputs for it, and a call that reads it and checks what it has read."""
    good, manifest = template["model.safetensors"], json.loads(template["manifest.json"])
    header, content = unpacked(good)
    tokens = packed(tokens_header(), random_tokens(100).tobytes())
    records = b"".join(json.dumps({"global_step": step, "loss": 1.5}).encode() + b"\n" for step in range(3))

    unchanged = arrays_of(*trained)

    def with_model_json(text):
        metadata = {"__metadata__": {"model.json": text.decode(errors="replace")}}
        return packed(header | metadata, content)

    def read_weights(path):
        model = load_saved_model(path)
        arrays = named_arrays(nnx.state(model))
        assert arrays[TABLE].shape == (model.config.vocab_size, model.config.emb_dim)
        for name, array in load_file(path).items():
            assert np.isfinite(array).all() and (np.asarray(arrays.pop(name)) == array).all()
        assert not arrays

    def read_checkpoint(path):
        try:
            checkpointing.load(checkpoint, *trained)
        except ValueError:
            assert all(now is then for now, then in zip(arrays_of(*trained), unchanged, strict=True))
            raise
        assert all(np.isfinite(array).all() for array in arrays_of(trained[0]))
        path.write_bytes(good)
        checkpointing.load(checkpoint, *trained)
        unchanged[:] = arrays_of(*trained)

    def read_meta(path):
        assert Checkpoint(path.parent).meta.get("global_step", 7) == 7

    def read_manifest(path):
        verify(checkpoint)
        assert json.loads(path.read_bytes()) == manifest

    def read_tokens(path):
        ids = load_tokens(path, VOCAB_SIZE)
        assert ids.dtype == np.uint16 and ids.size > 0 and ids.max() < VOCAB_SIZE

    def read_metrics(path):
        assert all(isinstance(record["global_step"], int | float) for record in metrics.read(path))

    folder, any_json = checkpoint.path, json_values.map(lambda value: json.dumps(value).encode())
    return {
        "weights, damaged": (weights, damaged(good), read_weights),
        "weights, with a lying header": (weights, lying(good), read_weights),
        "weights of a checkpoint": (weights, lying(good), read_checkpoint),
        "model.json in weights": (weights, hostile_json(SHAPE).map(with_model_json), read_weights),
        "model.json": (folder / "model.json", hostile_json(TINY_MODEL), JSON_READERS["model.json"]),
        "train.json": (folder / "train.json", hostile_json(GOOD_JSON["train.json"]), JSON_READERS["train.json"]),
        "meta.json": (folder / "meta.json", hostile_json(META), read_meta),
        "manifest.json": (folder / "manifest.json", hostile_json(manifest), read_manifest),
        "tokens": (tmp_path / "train.safetensors", damaged(tokens) | lying(tokens), read_tokens),
        "metrics.jsonl": (
            tmp_path / "metrics.jsonl",
            damaged(records) | (any_json | deep_json.map(str.encode)).map(lambda line: records + line + b"\n"),
            read_metrics,
        ),
        "name": (
            tmp_path / "any",
            st.binary(),
            lambda path: select_checkpoint(tmp_path, os.fsdecode(path.read_bytes())),
        ),
    }


@pytest.mark.parametrize("target", ATTEMPTS)
def test_malformed_input_is_refused_in_one_line_and_everything_else_is_sound(target, attempts):
    path, inputs, read = attempts[target]
    tried, malformed = ATTEMPTS[target]
    refused = set()

    @settings(
        max_examples=tried, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(inputs)
    def attempt(content):
        path.write_bytes(content)
        try:
            read(path)
        except AssertionError:
            raise
        except Exception as error:
            checked_line(error, path.parent)
            refused.add(content)

    attempt()
    assert len(refused) >= malformed
