"""`metrics.jsonl`: strict JSON lines, torn ends, and the cut on resume."""

import json
import math
import os
import tracemalloc

import pytest

from outside_in.storage import metrics


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def records(*steps):
    others = dict.fromkeys(metrics.NUMBERS | metrics.NULLABLE, 1.0)
    return [{"global_step": step, **others, "loss": 10 / (step + 1)} for step in steps]


def test_no_file_is_no_records(path):
    assert metrics.read(path) == []


def test_what_was_appended_is_read_oldest_first(path):
    metrics.append(path, records(0, 1))
    metrics.append(path, records(2), durable=True)
    assert metrics.read(path) == records(0, 1, 2)


def test_each_record_is_one_line_of_json_that_any_reader_understands(path):
    metrics.append(path, [{"global_step": 1, "note": "two\nlines – ü", "val_loss": None}])
    assert path.read_bytes().count(b"\n") == 1
    assert json.loads(path.read_text(encoding="utf-8"))["note"] == "two\nlines – ü"


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_does_not_have_is_never_written(path, number):
    with pytest.raises(ValueError, match="JSON"):
        metrics.append(path, [{"global_step": 1, "loss": number}])
    assert metrics.read(path) == []


@pytest.mark.parametrize(("number", "written"), [(1.5, 1.5), (math.nan, None), (math.inf, None), (-math.inf, None)])
def test_a_number_that_is_not_finite_becomes_null(number, written):
    assert metrics.finite(number) == written


@pytest.mark.parametrize("torn", ["{", '{"global_step": 2', '{"global_step": 2, "loss": 1.0}', "\x00\x00", "\udcff"])
def test_a_torn_last_line_is_ignored(path, torn):
    metrics.append(path, records(0, 1))
    with path.open("ab") as file:
        file.write(torn.encode("utf-8", "surrogateescape"))
    assert metrics.read(path) == records(0, 1)


@pytest.mark.parametrize(
    "bad",
    ["", "{", "7", "null", "[]", '"global_step"', "{}", '{"global_step": "2"}', '{"global_step": null}', "[" * 9999]
    + [f'{{"global_step": {step}}}' for step in ("2.0", "true", "NaN", "9" * 5000)]
    + [f'{{"global_step": 2, "loss": {loss}}}' for loss in ("NaN", "1e999", '"low"', "[1]", "{}", "9" * 400)]
    + ['{"global_step": 2, "\udcff": 1}', '{"global_step": 2}' + " " * metrics.MAX_LINE_BYTES],
)
def test_any_other_bad_line_is_an_error_that_names_it(path, bad):
    lines = [*map(json.dumps, records(0, 1)), bad, json.dumps(records(3)[0])]
    path.write_bytes(("\n".join(lines) + "\n").encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError) as caught:
        metrics.read(path)
    assert str(caught.value).startswith(f"{path}: line 3 ")
    assert "\n" not in str(caught.value)


def test_a_file_without_line_breaks_is_refused_without_reading_it_whole(path):
    path.write_bytes(b"{")
    os.truncate(path, 100_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="line 1 "):
            metrics.read(path)
        assert tracemalloc.get_traced_memory()[1] < 10 * metrics.MAX_LINE_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_refused_without_waiting_for_it(path, make):
    make(path)
    with pytest.raises(ValueError, match="got a folder or a device"):
        metrics.read(path)


@pytest.mark.parametrize(("step", "kept"), [(-1, []), (0, [0]), (2, [0, 1, 2]), (9, [0, 1, 2, 3])])
def test_the_cut_keeps_the_lines_up_to_the_step(path, step, kept):
    metrics.append(path, records(0, 1, 2, 3))
    assert metrics.cut_after(path, step) == records(*kept)
    assert metrics.read(path) == records(*kept)


def test_the_cut_drops_a_torn_line_so_that_the_next_one_is_whole(path):
    metrics.append(path, records(0, 1))
    with path.open("a") as file:
        file.write('{"global_st')
    metrics.cut_after(path, 1)
    metrics.append(path, records(2))
    assert metrics.read(path) == records(0, 1, 2)


@pytest.mark.parametrize("bad", ["{", "", '{"global_step": 3, "loss": NaN}'])
def test_what_stands_after_the_cut_may_be_anything(path, bad):
    metrics.append(path, records(1, 2))
    with path.open("a") as file:
        file.write(f"{bad}\n")
    assert metrics.cut_after(path, 2) == records(1, 2)
    assert metrics.read(path) == records(1, 2)


@pytest.mark.parametrize("name", sorted(metrics.NUMBERS | metrics.NULLABLE))
@pytest.mark.parametrize("is_there", [False, True])
def test_a_record_before_the_cut_that_lacks_something_is_refused_and_the_file_left_alone(path, name, is_there):
    first, second = records(1, 2)
    del second[name]
    metrics.append(path, [first, second | ({name: None} if is_there else {}), *records(3)])
    content = path.read_bytes()
    if is_there and name in metrics.NULLABLE:
        assert len(metrics.cut_after(path, 2)) == 2
    else:
        with pytest.raises(ValueError, match=f"step 2 lacks {name}; "):
            metrics.cut_after(path, 2)
        assert path.read_bytes() == content
    assert metrics.cut_after(path, 1) == [first]


def test_the_cut_leaves_no_other_file_behind(path):
    assert metrics.cut_after(path, 5) == []
    assert not path.exists()
    metrics.append(path, records(0, 1))
    path.with_suffix(".jsonl.tmp").write_text("left by a killed process")
    metrics.cut_after(path, 0)
    assert list(path.parent.iterdir()) == [path]
    assert metrics.read(path) == records(0)
