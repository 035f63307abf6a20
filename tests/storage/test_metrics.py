"""`metrics.jsonl`: strict JSON lines, torn ends, and the cut on resume."""

import io
import json
import math
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from outside_in.storage import metrics
from outside_in.storage.records import Records

MORE = {"learning_rate": 1e-3, "gradient_norm": 0.5, "clipped": False, "rejected": False, "rejected_updates": 0}


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
    assert len(metrics.cut_after(path, step)) == len(kept)
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
    assert len(metrics.cut_after(path, 2)) == 2
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
    assert len(metrics.cut_after(path, 1)) == 1
    assert metrics.read(path) == [first]


def test_the_cut_of_no_file_makes_none(path):
    assert len(metrics.cut_after(path, 5)) == 0
    assert not path.exists()


def many(last):
    return [*records(*range(1, last)), records(last)[0] | {"val_loss": 2.5, "gradient_norm": None}]


def test_records_in_columns_are_what_the_file_holds(path):
    metrics.append(path, whole := many(9_000))
    columns = metrics.load(path)
    assert len(columns) == 9_000 and columns.last == whole[-1]
    for name in columns.names():
        expected = np.array([record.get(name) for record in whole], float)
        np.testing.assert_array_equal(columns.column(name), expected)
        for newest in (0, 1, 807, 808, 809, 5_000, 9_000, 10_000):  # 808 are not packed
            np.testing.assert_array_equal(columns.column(name, newest), expected[9_000 - min(newest, 9_000) :])
    assert np.isnan(columns.column("unknown")).all()


@pytest.mark.parametrize(
    "numbers", [[0.1, 1e300, -1e-300], [2**53 - 1, 2**24 + 1, 0], [True, False, None], [1e39, 0, 0]]
)
def test_no_column_loses_a_digit(numbers):
    columns = Records({"global_step": i, "x": numbers[i % 3]} for i in range(10_000))
    np.testing.assert_array_equal(columns.column("x"), np.array((numbers * 3_334)[:10_000], float))


def test_a_million_records_take_less_than_100_mb():
    tracemalloc.start()
    columns = Records()
    for step in range(1, 1_000_001, 4_000):
        columns.extend(
            [
                {"global_step": s, "tokens_seen": 8_192 * s, "loss": s / 7, "seconds": s / 3, **MORE}
                for s in range(step, step + 4_000)
            ]
        )
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(columns) == 1_000_000 and size < 100e6


@pytest.mark.parametrize("line", [5_000, 8_999])
@pytest.mark.parametrize(
    "bad",
    [
        '{"global_step": 1}, {"global_step": 2}',
        '{"global_step": 1, "x": {}',
        '{"global_step": 1, "x": 1e999}',
        '{"global_step": 1, "x": NaN}',
    ],
)
def test_a_bad_line_far_down_is_named(path, bad, line):
    lines = [json.dumps(record) for record in many(9_000)]
    lines[line - 1] = bad
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=f"line {line} is not a metrics record"):
        metrics.read(path)


def test_a_line_may_not_end_in_the_next_one(path):
    path.write_text('{"global_step": 1, "x": [{}\n{}]}\n')
    with pytest.raises(ValueError, match="line 1 is not"):
        metrics.read(path)


@pytest.mark.parametrize("is_written", [False, True])
def test_a_number_is_added_to_the_newest_record(path, is_written):
    log = metrics.MetricsLog(path)
    for record in records(1, 2):
        log.append(record)
    if is_written:
        log.write()
    log.amend("val_loss", 2.5)
    log.write()
    first, second = records(1, 2)
    assert metrics.read(path) == [first, second | {"val_loss": 2.5}]
    log = metrics.MetricsLog(path)
    log.cut_after(1)
    log.amend("val_loss", 1.5)
    assert metrics.read(path) == [first | {"val_loss": 1.5}]


def test_when_the_disk_is_full_the_newest_record_stays_as_it_was(path, monkeypatch):
    log = metrics.MetricsLog(path)
    for record in records(1, 2):
        log.append(record)
    log.write()
    content = path.read_bytes()

    class Full(io.FileIO):
        def write(self, data):
            return super().write(data if data in content else data[:-9])

    monkeypatch.setattr(Path, "open", lambda self, mode, **_: Full(self, mode))
    with pytest.raises(OSError, match="No space"):
        log.amend("val_loss", 2.5)
    assert path.read_bytes() == content
