import datetime
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import captured_log, random_tokens, tiny_model, tiny_train_config
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import checkpointing
from checkpointing import copy_to_host, find_checkpoints, load, prune, save, select_checkpoint, verify
from outside_in.data.loader import TokenStream
from outside_in.optimizer import make_optimizer
from outside_in.train_step import train_step
from outside_in.weights import load_model, read_model_json

MODEL_JSON = '{"any": "text"}'
ONE_LAYER_NAMES = {
    "token_embedding.embedding",
    "position_embedding.embedding",
    "blocks.0.attention_norm.scale",
    "blocks.0.attention_norm.bias",
    "blocks.0.attention.query_key_value.kernel",
    "blocks.0.attention.output.kernel",
    "blocks.0.attention.output.bias",
    "blocks.0.feed_forward_norm.scale",
    "blocks.0.feed_forward_norm.bias",
    "blocks.0.feed_forward.expand.kernel",
    "blocks.0.feed_forward.expand.bias",
    "blocks.0.feed_forward.project.kernel",
    "blocks.0.feed_forward.project.bias",
    "output_norm.scale",
    "output_norm.bias",
    "head.embedding",
}


class Small(nnx.Module):
    """Two parameters, one of them laid out by columns and with every kind of finite float in it."""

    def __init__(self, value=0.0):
        self.matrix = nnx.Param(jnp.array([[value, -0.0, -3e38], [3e38, 1e-45, 1 / 3]], jnp.float32).T)
        self.scalar = nnx.Param(jnp.float32(value))


def small(value=0.0):
    model = Small(value)
    return model, nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)


def meta(step=1, is_best=False, **more):
    return {"global_step": step, "is_best": is_best, **more}


def bits(*modules):
    """Every array of models and optimizers as type, shape and bytes."""
    arrays = {
        (i, path): np.asarray(v[...]) for i, m in enumerate(modules) for path, v in nnx.to_flat_state(nnx.state(m))
    }
    return {name: (str(array.dtype), array.shape, array.tobytes()) for name, array in arrays.items()}


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def files_of(checkpoint):
    return [path for path in sorted(checkpoint.path.rglob("*")) if path.is_file()]


def flip_bit(path, position=0.5):
    content = bytearray(path.read_bytes())
    content[int(position * (len(content) - 1))] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A checkpoints folder with three good ones, of steps 10 (best), 20 and 30."""
    folder = tmp_path_factory.mktemp("template") / "checkpoints"
    for step in (10, 20, 30):
        save(folder, copy_to_host(*small(step)), meta(step, is_best=step == 10), MODEL_JSON)
    return folder


@pytest.fixture
def three(template, tmp_path):
    """A copy of the template: the folder, and its checkpoints from old to new."""
    shutil.copytree(template, tmp_path / "checkpoints", symlinks=True)
    return tmp_path / "checkpoints", find_checkpoints(tmp_path / "checkpoints")


# What a kill after a commit leaves undone


def links(folder):
    return {link: str((folder / link).readlink()) for link in ("latest", "best") if (folder / link).is_symlink()}


def test_settling_points_the_links_prunes_and_removes_what_is_half_written(three):
    folder, (first, middle, newest) = three
    good = links(folder)
    for old in ({"latest": first.path.name, "best": middle.path.name}, {}):
        for link in ("latest", "best"):
            (folder / link).unlink(missing_ok=True)
            if old:
                (folder / link).symlink_to(old[link])
        (folder / ".staging-20260101T000000Z-iteration-5").mkdir()
        checkpointing.repair_links_and_prune(folder)
        assert links(folder) == good == {"latest": newest.path.name, "best": first.path.name}
        assert names_in(folder) == {"latest", "best"} | {c.path.name for c in (first, middle, newest)}
    checkpointing.repair_links_and_prune(folder, keep=1)
    assert find_checkpoints(folder) == [first, newest]


def test_links_that_cannot_be_made_do_not_make_a_committed_checkpoint_a_failure(three, monkeypatch):
    folder, checkpoints = three

    def no_inodes(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "symlink_to", no_inodes)
    saved = save(folder, copy_to_host(*small(40)), meta(40), MODEL_JSON)
    assert find_checkpoints(folder) == [*checkpoints, saved]
    checkpointing.repair_links_and_prune(folder, 1)  # links are hints
    assert find_checkpoints(folder) == [checkpoints[0], saved]
    assert select_checkpoint(folder, "best") == checkpoints[0] and select_checkpoint(folder, None) == saved


def test_a_name_that_is_damaged_twice_is_kept_twice(three):
    folder, (_, good, newest) = three
    for _ in range(2):
        (newest.path / "meta.json").write_text("{")
        assert select_checkpoint(folder, None) == good
        shutil.copytree(good.path, newest.path)
    aside = f"damaged-{newest.path.name}"
    assert {aside, f"{aside}-again"} <= names_in(folder)


def test_a_link_to_a_disk_that_is_not_there_is_no_empty_folder(tmp_path):
    (tmp_path / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="a broken link"):
        select_checkpoint(tmp_path / "checkpoints", None)


# What is saved


@pytest.mark.parametrize("microbatches_per_call", [None, 1], ids=["A=K", "A=1"])
def test_a_loaded_checkpoint_of_a_trained_model_is_the_saved_one_bit_for_bit(tmp_path, microbatches_per_call):
    config = tiny_train_config(gradient_accumulation_steps=2, microbatches_per_call=microbatches_per_call)
    stream = TokenStream(jnp.asarray(random_tokens(500)), (2, 2, 16), "next-token", seed=0, shuffle=False)

    def build(seed):
        model = tiny_model(seed, n_layers=0)  # compiles fast
        return model, make_optimizer(model, config, total_steps=12)

    first, second = build(seed=0), build(seed=1)
    for step in range(3):
        for call in stream.calls(step, config.calls_per_step):
            train_step(*first, jax.device_put(call), jax.random.key(0), config)
    saved = bits(*first)
    checkpoint = save(tmp_path / "checkpoints", copy_to_host(*first), meta(3), MODEL_JSON)
    assert bits(*first) == saved  # saving changes nothing
    assert bits(*second).keys() == saved.keys() and bits(*second) != saved
    load(checkpoint, *second)
    assert bits(*second) == saved


def test_every_kind_of_float_and_memory_layout_survives(tmp_path):
    first, second = small(2.5), small()
    load(save(tmp_path / "checkpoints", copy_to_host(*first), meta(), MODEL_JSON), *second)
    assert bits(*second) == bits(*first)


def test_the_layout_is_the_one_of_the_design(tmp_path):
    checkpoint = save(tmp_path / "checkpoints", copy_to_host(*small()), meta(375, is_best=True, loss=1.5), MODEL_JSON)
    name = checkpoint.path.name
    assert names_in(checkpoint.path.parent) == {name, "latest", "best"}
    assert names_in(checkpoint.path) == {"model.safetensors", "optimizer", "meta.json", "manifest.json"}
    assert [str((checkpoint.path.parent / link).readlink()) for link in ("latest", "best")] == [name, name]
    assert checkpoint.meta == json.loads((checkpoint.path / "meta.json").read_text()) == meta(375, True, loss=1.5)
    assert (checkpoint.path / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert checkpoint.global_step == 375 and checkpoint.is_best


def test_a_name_is_utc_time_and_global_step(tmp_path, monkeypatch):
    moment = datetime.datetime(2026, 11, 21, 9, 30, tzinfo=datetime.UTC)
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    monkeypatch.setattr(time, "time", moment.timestamp)
    try:
        checkpoint = save(tmp_path / "checkpoints", copy_to_host(*small()), meta(375), MODEL_JSON)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert checkpoint.path.name == "20261121T093000Z-iteration-375"


def test_weights_go_by_dot_joined_paths_and_carry_the_model_json(tmp_path):
    model = tiny_model(n_layers=1)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    text = model.config.model_dump_json()
    weights = save(tmp_path / "checkpoints", copy_to_host(model, optimizer), meta(), text).path / "model.safetensors"
    with safe_open(weights, "numpy") as file:
        assert file.metadata() == {"model.json": text}
        assert set(file.keys()) == ONE_LAYER_NAMES
        embedding = file.get_tensor("token_embedding.embedding")
    np.testing.assert_array_equal(embedding, model.token_embedding.embedding[...])
    assert read_model_json(weights) == text


def test_a_tied_head_is_saved_once_and_stays_tied(tmp_path):
    first, second = (tiny_model(seed, n_layers=1, tied_head=True) for seed in (0, 1))
    optimizer = nnx.Optimizer(first, optax.sgd(0.1), wrt=nnx.Param)
    weights = (
        save(tmp_path / "checkpoints", copy_to_host(first, optimizer), meta(), MODEL_JSON).path / "model.safetensors"
    )
    assert set(load_file(weights)) == ONE_LAYER_NAMES - {"head.embedding"}
    load_model(weights, second)
    assert bits(second) == bits(first)


def test_the_manifest_describes_every_other_file(three):
    for checkpoint in three[1]:
        expected = {
            str(path.relative_to(checkpoint.path)): {
                "size": len(path.read_bytes()),
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for path in files_of(checkpoint)
            if path.name != "manifest.json"
        }
        assert json.loads((checkpoint.path / "manifest.json").read_text()) == expected
        assert any(name.startswith("optimizer/") for name in expected)


# Damage

DAMAGES = {
    "first bit": lambda path: flip_bit(path, 0),
    "middle bit": lambda path: flip_bit(path, 0.5),
    "last bit": lambda path: flip_bit(path, 1),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "emptied": lambda path: os.truncate(path, 0),
    "deleted": Path.unlink,
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


def choose_and_undo(folder, damaged):
    """Choose the newest good checkpoint when the newest is damaged, and give that one its name back."""
    with captured_log() as lines:
        chosen = select_checkpoint(folder, None)
    [line] = lines
    aside = folder / f"damaged-{damaged.path.name}"
    assert not damaged.path.exists() and f"kept as {aside.name}" in line
    assert {(folder / link).resolve().name for link in ("latest", "best")} <= names_in(folder)
    aside.rename(damaged.path)
    return chosen, line


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_named_and_the_newest_good_checkpoint_taken(three, damage):
    folder, (_, good, newest) = three
    for path in files_of(newest):
        content = path.read_bytes()
        if not content and damage not in ("longer", "deleted", "folder"):
            continue  # an empty file has nothing to lose
        DAMAGES[damage](path)
        for which in ("latest", newest.path.name):
            with pytest.raises(ValueError, match=newest.path.name):
                select_checkpoint(folder, which)
        assert find_checkpoints(folder)[-1] == newest  # asking for it does not move it
        chosen, line = choose_and_undo(folder, newest)
        assert chosen == good
        # a manifest that is still JSON differs from some other file
        assert str(path) in line or (path.name == "manifest.json" and "bit" in damage and str(newest.path) in line)
        assert "\n" not in line
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(content)
    assert select_checkpoint(folder, None) == newest


@pytest.mark.parametrize("number", sorted(checkpointing.NO_DAMAGE))
@pytest.mark.parametrize("name", ["manifest.json", "meta.json", "model.safetensors"])
def test_a_file_that_this_process_may_not_read_is_no_damage(three, monkeypatch, name, number):
    folder, (*_, newest) = three
    really_open = Path.open

    def refused(path, *arguments, **options):
        if path == newest.path / name:
            raise OSError(number, os.strerror(number))
        return really_open(path, *arguments, **options)

    before = listing(folder)
    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(ValueError, match=f"{name}: .*{os.strerror(number)}"):
        select_checkpoint(folder, None)
    monkeypatch.undo()
    assert listing(folder) == before
    assert select_checkpoint(folder, None) == newest


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "._model.safetensors", "desktop.ini"])
def test_a_stray_file_in_any_folder_is_no_damage(three, name):
    folder, (*_, newest) = three
    state = copy_to_host(*small())
    for parent in {path.parent for path in files_of(newest)}:
        (parent / name).write_bytes(b"\0")
    assert select_checkpoint(folder, None) == newest
    assert checkpointing.read(newest).optimizer.keys() == state.optimizer.keys()


def test_a_manifest_that_does_not_list_the_meta_is_damage(three):
    folder, (_, good, newest) = three
    described = json.loads((newest.path / "manifest.json").read_text())
    del described["meta.json"]
    (newest.path / "manifest.json").write_text(json.dumps(described))
    assert select_checkpoint(folder, None) == good


def test_every_single_flipped_bit_of_a_manifest_is_noticed(tmp_path):
    checkpoint = checkpointing.Checkpoint(tmp_path / "20261121T093000Z-iteration-1")
    checkpoint.path.mkdir()
    content = json.dumps(meta(1)).encode()
    (checkpoint.path / "meta.json").write_bytes(content)
    manifest = checkpoint.path / "manifest.json"
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    good = json.dumps({"meta.json": entry}, indent=2).encode()
    manifest.write_bytes(good)
    verify(checkpoint)
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(bad)
        with pytest.raises(ValueError, match=checkpoint.path.name):
            verify(checkpoint)


@pytest.mark.parametrize("content", ["[]", "{}", "null", "3", '{"meta.json": 3}', '{"meta.json": {}}', "[" * 100_000])
@pytest.mark.parametrize("name", ["manifest.json", "meta.json"])
def test_json_of_any_other_form_is_damage(three, name, content):
    folder, (_, good, newest) = three
    (newest.path / name).write_text(content)
    chosen, line = choose_and_undo(folder, newest)
    assert chosen == good and newest.path.name in line
    assert not checkpointing.Checkpoint(newest.path).is_best or name == "manifest.json"


def test_a_file_that_the_disk_cannot_read_is_damage(three, monkeypatch):
    folder, (_, good, newest) = three
    digest = hashlib.file_digest

    def failing(file, algorithm):
        if file.name == str(newest.path / "model.safetensors"):
            raise OSError(5, "Input/output error")
        return digest(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", failing)
    with captured_log() as lines:
        chosen = select_checkpoint(folder, None)
    [line] = lines
    assert chosen == good and str(newest.path / "model.safetensors") in line


def test_damage_on_damage_falls_back_further_and_the_last_one_is_an_error(three):
    folder, (oldest, middle, newest) = three
    flip_bit(newest.path / "model.safetensors")
    flip_bit(middle.path / "meta.json")
    with captured_log() as lines:
        chosen = select_checkpoint(folder, None)
    assert chosen == oldest
    assert [str(c.path) in line for c, line in zip((newest, middle), lines, strict=True)] == [True, True]
    assert find_checkpoints(folder) == [oldest]
    assert {f"damaged-{c.path.name}" for c in (newest, middle)} < names_in(folder)
    assert [(folder / link).resolve().name for link in ("latest", "best")] == [oldest.path.name] * 2
    prune(folder, 1)
    added = save(folder, copy_to_host(*small()), meta(40), MODEL_JSON)
    assert f"damaged-{newest.path.name}" in names_in(folder)  # what is kept for inspection is never pruned
    shutil.rmtree(added.path)
    (oldest.path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no good checkpoint is left") as error:
        select_checkpoint(folder, None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("swapped", ["model.safetensors", "meta.json", "manifest.json", "optimizer", "everything"])
def test_files_of_another_checkpoint_are_damage(three, swapped):
    folder, (_, good, newest) = three
    source, target = (c.path if swapped == "everything" else c.path / swapped for c in (good, newest))
    if target.is_dir():
        shutil.rmtree(target)
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)
    with captured_log() as lines:
        chosen = select_checkpoint(folder, None)
    [line] = lines
    assert chosen == good and newest.path.name in line


def test_a_damaged_best_one_leaves_the_link_to_the_one_before_or_none(three):
    folder, (oldest, _, newest) = three
    best = save(folder, copy_to_host(*small()), meta(40, is_best=True), MODEL_JSON)
    flip_bit(best.path / "model.safetensors")
    assert select_checkpoint(folder, None) == newest
    assert (folder / "best").resolve().name == oldest.path.name
    shutil.rmtree(oldest.path)
    flip_bit(newest.path / "model.safetensors")
    select_checkpoint(folder, None)
    assert not (folder / "best").is_symlink()


# Choosing


@pytest.mark.parametrize("make_folder", [False, True])
def test_where_nothing_was_saved_there_is_nothing_to_choose(tmp_path, make_folder):
    folder = tmp_path / "checkpoints"
    if make_folder:
        folder.mkdir()
    assert select_checkpoint(folder, None) is None
    with pytest.raises(ValueError, match="available: none"):
        select_checkpoint(folder, "latest")


def test_a_checkpoint_is_chosen_by_best_latest_or_name(three):
    folder, (oldest, middle, newest) = three
    assert select_checkpoint(folder, None) == select_checkpoint(folder, "latest") == newest
    assert select_checkpoint(folder, "best") == oldest
    assert select_checkpoint(folder, middle.path.name) == middle


def test_links_are_hints_and_never_the_truth(three):
    folder, (oldest, _, newest) = three
    for link in ("latest", "best"):
        (folder / link).unlink()
        (folder / link).symlink_to("nowhere")
    assert select_checkpoint(folder, "latest") == newest
    assert select_checkpoint(folder, "best") == oldest


@pytest.mark.parametrize("which", ["", "nonsense", "..", "../checkpoints", ".", "/", "20200101T000000Z-iteration-1"])
def test_an_unknown_name_is_refused_with_the_known_ones(three, which):
    folder, checkpoints = three
    with pytest.raises(ValueError, match="no checkpoint") as error:
        select_checkpoint(folder, which)
    assert all(c.path.name in str(error.value) for c in checkpoints)


def test_a_way_around_by_dots_is_refused(three):
    folder, [*_, newest] = three
    for which in (f"../{folder.name}/{newest.path.name}", f"{newest.path.name}/../{newest.path.name}"):
        with pytest.raises(ValueError, match="no checkpoint"):
            select_checkpoint(folder, which)


def test_nothing_but_folders_with_a_checkpoints_name_is_a_checkpoint(three):
    folder, checkpoints = three
    (folder / "20990101T000000Z-iteration-7").write_text("a file")
    (folder / "20990101T000000Z-iteration-8").symlink_to(checkpoints[0].path.name)
    for name in ("notes", ".staging-20990101T000000Z-iteration-9", "20990101T000000Z-iteration-9.bak"):
        (folder / name).mkdir()
    assert find_checkpoints(folder) == checkpoints


# Failures while saving


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "ctrl-c"])
@pytest.mark.parametrize(
    "broken", [(checkpointing, "save_weights"), (checkpointing.ocp, "save"), (os, "fsync"), (Path, "rename")], ids=str
)
def test_a_failing_save_leaves_the_folder_as_it_was(three, monkeypatch, broken, error):
    folder, [*_, newest] = three
    before = listing(folder)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(*broken, fail)
    with pytest.raises(type(error)):
        save(folder, copy_to_host(*small()), meta(40, is_best=True), MODEL_JSON)
    monkeypatch.undo()
    assert listing(folder) == before
    assert select_checkpoint(folder, None) == newest


def test_meta_that_is_not_strict_json_is_not_committed(three):
    folder, _ = three
    before = listing(folder)
    with pytest.raises(ValueError):
        save(folder, copy_to_host(*small()), meta(40, loss=float("nan")), MODEL_JSON)
    assert listing(folder) == before


def test_leftovers_of_a_killed_save_are_invisible_and_go_with_the_next_one(three):
    folder, [*_, newest] = three
    shutil.copytree(newest.path, folder / ".staging-20990101T000000Z-iteration-40")
    (folder / ".latest.tmp").symlink_to("nowhere")
    assert select_checkpoint(folder, None) == newest
    added = save(folder, copy_to_host(*small()), meta(40), MODEL_JSON)
    assert select_checkpoint(folder, None) == added
    assert not [name for name in names_in(folder) if name.startswith(".")]


def test_a_checkpoint_whose_removal_is_cut_short_is_gone(three, monkeypatch):
    folder, [_, _, newest] = three

    def killed(path):
        (path / "manifest.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(folder, 1)
    monkeypatch.undo()
    assert 20 not in [c.global_step for c in find_checkpoints(folder)]
    for checkpoint in find_checkpoints(folder):
        verify(checkpoint)
    assert select_checkpoint(folder, None) == newest


# Names, links and pruning


@pytest.mark.parametrize("clock", [[5e8, 4e8, 3e8], [5e8] * 3, [5e8, 1e8, 6e8]], ids=["backwards", "still", "jumping"])
def test_names_sort_in_the_order_of_commits_whatever_the_clock_says(tmp_path, monkeypatch, clock):
    times = iter(clock)
    steps = [300, 20, 1]  # going on from an earlier checkpoint makes the step smaller
    for step in steps:
        now = next(times)
        monkeypatch.setattr(time, "time", lambda now=now: now)
        save(tmp_path, copy_to_host(*small()), meta(step), MODEL_JSON)
        monkeypatch.undo()
    assert [c.global_step for c in find_checkpoints(tmp_path)] == steps
    assert select_checkpoint(tmp_path, None).global_step == 1


@pytest.mark.parametrize(
    ("keep", "survivors"),
    [(None, [10, 20, 30]), (1, [10, 30]), (2, [10, 20, 30]), (3, [10, 20, 30]), (9, [10, 20, 30])],
)
def test_pruning_keeps_the_newest_and_the_best(three, keep, survivors):
    folder, _ = three
    prune(folder, keep)
    assert [c.global_step for c in find_checkpoints(folder)] == survivors
    assert names_in(folder) == {*(c.path.name for c in find_checkpoints(folder)), "best", "latest"}


def test_of_several_best_ones_the_newest_is_kept(tmp_path):
    for step, is_best in [(1, True), (2, True), (3, False), (4, False)]:
        save(tmp_path, copy_to_host(*small()), meta(step, is_best), MODEL_JSON)
    prune(tmp_path, 1)
    assert [c.global_step for c in find_checkpoints(tmp_path)] == [2, 4]
    assert select_checkpoint(tmp_path, "best").global_step == 2


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    keep=st.integers(1, 4),
    commits=st.lists(st.tuples(st.integers(0, 999), st.booleans(), st.integers(-(10**6), 10**6)), max_size=10),
)
def test_best_and_latest_survive_any_sequence_of_saves_and_clock_jumps(keep, commits):
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as monkeypatch:
        folder, now, alive = Path(name), 1e9, []
        monkeypatch.setattr(checkpointing, "save_weights", lambda path, arrays, *described: path.write_bytes(b""))
        monkeypatch.setattr(checkpointing.ocp, "save", lambda path, state: None)
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)
        monkeypatch.setattr(time, "time", lambda: now)
        for number, (step, is_best, jump) in enumerate(commits):
            now += jump
            save(folder, TINY, meta(step, is_best, number=number), MODEL_JSON)
            prune(folder, keep)
            alive.append((number, step, is_best))
            history = [each for i, each in enumerate(alive) if all(each[1] < later[1] for later in alive[i + 1 :])]
            best = [commit for commit in history if commit[2]][-1:]
            alive = [commit for commit in alive if commit in alive[-keep:] or commit in best]
            found = [(c.meta["number"], c.global_step, c.is_best) for c in find_checkpoints(folder)]
            assert found == alive
            for link, commit in [("latest", alive[-1:]), ("best", best)]:
                found = [json.loads((folder / link / "meta.json").read_text())["number"]] if commit else []
                assert found == [number for number, *_ in commit]
            assert select_checkpoint(folder, "latest").meta["number"] == number


TINY = checkpointing.HostCopy({}, {})


# What is refused


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda arrays: arrays.pop("scalar"), "lacks 1 arrays.*scalar"),
        (lambda arrays: arrays.update(more=np.zeros(2)), "has 1 arrays.*more"),
        (lambda arrays: arrays.update(matrix=arrays["matrix"].T.copy()), r"matrix: expected float32\[3, 2\].*\[2, 3\]"),
        (lambda arrays: arrays.update(scalar=np.zeros(1, np.float32)), r"scalar: expected float32\[\].*\[1\]"),
        (lambda arrays: arrays.update(scalar=np.array(0, np.float16)), r"scalar: expected float32\[\].*float16"),
        (lambda arrays: arrays.update(scalar=np.array(0, np.float64)), r"scalar: expected float32\[\].*float64"),
        (lambda arrays: arrays.clear(), "lacks 2 arrays"),
    ],
    ids=["missing", "extra", "shape", "rank", "half", "double", "none"],
)
def test_weights_of_another_form_are_refused_by_name_and_change_nothing(three, change, complaint):
    _, [*_, newest] = three
    weights = newest.path / "model.safetensors"
    arrays = load_file(weights)
    change(arrays)
    save_file(arrays, weights)
    model, optimizer = small(99)
    before = bits(model, optimizer)
    for attempt in (lambda: load(newest, model, optimizer), lambda: load_model(weights, model)):
        with pytest.raises(ValueError, match=complaint) as error:
            attempt()
        assert str(weights) in str(error.value) and "\n" not in str(error.value)
    assert bits(model, optimizer) == before


@pytest.mark.parametrize(
    "transformation", [optax.sgd(0.1), optax.adam(0.1, mu_dtype=jnp.bfloat16), optax.MultiSteps(optax.adam(0.1), 2)]
)
def test_another_optimizer_is_refused_and_the_model_unchanged(three, transformation):
    _, [*_, newest] = three
    model = Small(99)
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
    before = bits(model, optimizer)
    way_on = re.escape(f'"initial_weights": "{newest.path / "model.safetensors"}"')
    with pytest.raises(ValueError, match=rf"optimizer: .*cannot be resumed; .*{way_on}"):
        load(newest, model, optimizer)
    assert bits(model, optimizer) == before


@pytest.mark.parametrize(
    ("saved", "current"), [({}, {"emb_dim": 16}), ({}, {"tied_head": True}), ({"tied_head": True}, {})]
)
def test_a_model_of_another_shape_is_refused(tmp_path, saved, current):
    first, second = (tiny_model(n_layers=0, **changes) for changes in (saved, current))
    optimizers = [nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param) for model in (first, second)]
    checkpoint = save(tmp_path, copy_to_host(first, optimizers[0]), meta(), MODEL_JSON)
    before = bits(second)
    with pytest.raises(ValueError, match=r"model\.safetensors: .*(lacks|expected)"):
        load(checkpoint, second, optimizers[1])
    assert bits(second) == before
