"""The pages' content. `test_page_in_browser.py` looks at them as a reader does."""

import json
import re

import numpy as np
import pytest
from pages import HOSTILE, in_progress, record

from outside_in.reports import page_charts
from outside_in.reports.comparison_page import ComparedRun, comparison_page
from outside_in.reports.page import embedded, html, write
from outside_in.reports.run_page import MAX_REJECTIONS, MAX_SAMPLES, run_page
from outside_in.storage.records import Records
from outside_in.storage.run_directory import RunDirectory


def data_of(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def chart_of(page, title):
    return next(chart for chart in page.charts if chart["title"] == title)


def test_no_text_in_the_data_can_end_it():
    text = embedded({"name": HOSTILE})
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"name": HOSTILE}


def test_a_page_is_one_file_without_any_address_and_its_data_come_back(tmp_path):
    page = run_page(in_progress(tmp_path / "run", [record(1)]))
    page.title = HOSTILE
    write(tmp_path / "report.html", page)
    text = (tmp_path / "report.html").read_text()
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]
    assert data_of(text)["title"] == HOSTILE
    assert set(re.findall(r"https?://[^\"'\s]*", text)) == {"http://www.w3.org/2000/svg"}  # a name that SVG has
    assert not re.search(r"<(script|link|img)[^>]* (src|href)=(?!\"data:,)", text)
    assert "{{" not in text.replace("{{DATA}}", "")


def test_the_last_numbers_are_those_of_the_record(tmp_path):
    last = record(3, 2.123456789012345, 0.1234567890123, learning_rate=3.3e-05, val_loss=2.5)
    page = run_page(in_progress(tmp_path, [record(1, val_loss=2.25), record(2), last]))
    tiles = {name: value for name, value, _ in page.tiles}
    assert (tiles["training loss"], tiles["gradient norm"]) == (2.123456789012345, 0.1234567890123)
    assert (tiles["learning rate"], tiles["validation loss"], tiles["best validation loss"]) == (3.3e-05, 2.5, 2.25)
    assert chart_of(page, "Loss")["lines"][0]["y"][-1] == 2.123456789012345
    [table] = [table for table in page.tables if table["title"] == "Last line of metrics.jsonl"]
    assert {name: json.loads(value) for name, value in table["rows"]} == last


def test_a_million_steps_are_a_page_of_few_bytes_that_keeps_the_extremes_and_the_last_values(tmp_path):
    losses = np.random.default_rng(0).normal(3, 0.1, 1_000_000)
    losses[123_456], losses[765_432] = 9.5, 0.5
    records = (record(step, loss, norm=loss) for step, loss in enumerate(losses.tolist(), start=1))
    page = run_page(in_progress(tmp_path, records))
    assert len(html(page)) < 1_000_000
    every = chart_of(page, "Loss")["lines"][0]
    assert (max(every["y"]), min(every["y"]), every["y"][-1]) == (9.5, 0.5, losses[-1])
    assert page.clocks[0]["tokens"][-1] == 128_000_000 and page.clocks[0]["seconds"][-1] == 500_000


def test_what_is_not_finite_is_left_out_of_lines_and_null_elsewhere(tmp_path):
    page = run_page(in_progress(tmp_path, [record(1), record(2, None, None), record(3, None, 2.0)]))
    json.loads(embedded(page.charts), parse_constant=pytest.fail)
    assert chart_of(page, "Loss")["lines"][0]["x"] == [1]
    assert chart_of(page, "Gradient norm")["lines"][0]["x"] == [1, 3]
    assert chart_of(page, "Gradient norm")["lines"][-1] | {"y": 0} == page_charts.line(
        "rejected update", page_charts.Series(np.array([2.0]), np.zeros(1)), "crosses"
    ) | {"y": 0}
    assert next(value for name, value, _ in page.tiles if name == "training loss") is None


def test_the_training_loss_is_smoothed_and_the_gradient_norm_has_its_clip_line(tmp_path):
    records = [record(step, step % 2, norm=5.0 if step > 100 else 1.0) for step in range(1, 151)]
    page = run_page(in_progress(tmp_path, records, reference_losses={"uniform": 4.6}, bytes_per_token=2.0))
    every, smooth, _ = chart_of(page, "Loss")["lines"]
    assert (every["kind"], smooth["name"], set(smooth["y"])) == ("thin", "training, mean of 2 steps", {0.5})
    assert chart_of(page, "Loss")["levels"] == [{"name": "uniform", "value": 4.6, "scales": True}]
    assert chart_of(page, "Loss")["right"]["factor"] == pytest.approx(1 / (2 * np.log(2)))
    [level] = chart_of(page, "Gradient norm")["levels"]
    assert (level["value"], level["scales"]) == (3.5, False) and "50 of 150 steps" in level["name"]


def test_tokens_per_second_are_the_median_of_each_period_so_that_compiling_does_not_show(tmp_path):
    records = [record(step, seconds=60.0 if step == 1 else 0.5) for step in range(1, 751)]
    page = run_page(in_progress(tmp_path, records, mfu_of_one=0.001))
    assert set(chart_of(page, "Speed")["lines"][0]["y"]) == {256}
    assert chart_of(page, "Speed")["right"] == {"unit": "MFU", "factor": 0.1, "suffix": "%"}
    assert ("MFU", "25.6%", "lately") in page.tiles


def test_numbers_by_layer_are_heat_maps_with_blocks_in_their_order_and_without_them_there_is_none(tmp_path):
    names = [f"gradient_norm/blocks.{i}" for i in (10, 2, 0)] + ["update_norm/head"]
    records = [record(s) | (dict.fromkeys(names, s / 10) if s % 10 == 0 else {}) for s in range(1, 5001)]
    first, second = run_page(in_progress(tmp_path, records)).heat_maps
    assert (first["title"], first["rows"]) == ("Gradient norm", ["blocks.0", "blocks.2", "blocks.10"])
    assert (second["title"], second["rows"]) == ("Update norm", ["head"])
    assert len(first["steps"]) == 200 and first["steps"][0] == 10 and first["steps"][-1] == 5000
    assert all(row == [step / 10 for step in first["steps"]] for row in first["values"])
    assert run_page(in_progress(tmp_path, [record(1)])).heat_maps == []


def test_a_run_without_any_step_has_a_page(tmp_path):
    page = run_page(in_progress(tmp_path, []))
    assert page.status == "running: step 0 of 100" and page.reload_seconds and page.charts == page.tiles == []


def test_only_the_page_of_a_run_that_is_on_reloads_itself(tmp_path):
    assert run_page(in_progress(tmp_path, [record(1)])).reload_seconds
    page = run_page(in_progress(tmp_path, [record(40)]), "stopped")
    assert page.reload_seconds is None and page.status == "stopped: step 40 of 100"


def test_rejections_are_events_with_what_their_record_says_and_many_are_counted(tmp_path):
    records = [record(step, norm=None) for step in range(1, MAX_REJECTIONS + 4)]
    last = RunDirectory(tmp_path).rejected(MAX_REJECTIONS + 3)
    last.write_text(json.dumps({"reason": "a gradient is not finite", "first_gradient_not_finite": "head"}))
    RunDirectory(tmp_path).rejected(MAX_REJECTIONS + 2).write_text("[")
    events = [{"global_step": 0, "time": 1e9, "text": "started"}, {"global_step": 5, "time": 2e9, "text": "resumed"}]
    page = run_page(in_progress(tmp_path, records, events=events))
    texts = [text for _, _, text in page.tables[0]["rows"]]
    assert texts[0] == "started" and texts[-1] == "update rejected: a gradient is not finite (head)"
    assert "update rejected; 3 more were rejected before it" in texts and texts[-2] == "update rejected"
    assert page.marks == [{"step": 5, "text": "resumed"}]


def test_samples_of_many_checkpoints_are_some_of_them_with_the_first_and_the_last(tmp_path):
    lines = [f"step {step} | {text}\n" for step in range(10, 5001, 10) for text in ("one | two", HOSTILE[:20])]
    RunDirectory(tmp_path).samples.write_text("".join(lines) + "step 9999 | torn")
    found = run_page(in_progress(tmp_path, [record(1)])).samples
    assert len(found) == MAX_SAMPLES and found[0] == (10, ["one | two", HOSTILE[:20]])
    assert found[-1][0] in (5000, 9999)


@pytest.mark.parametrize("meta", ["", "[]", "{", '{"val_loss": "low", "peak_memory_bytes": [], "is_best": 1}'])
def test_a_damaged_checkpoint_does_not_keep_a_page_from_being_written(tmp_path, meta):
    checkpoint = RunDirectory(tmp_path).checkpoints / "20261121T093000Z-iteration-7"
    checkpoint.mkdir(parents=True)
    (checkpoint / "meta.json").write_text(meta)
    rows = run_page(in_progress(tmp_path, [record(7)])).tables[1]["rows"]
    assert rows == [[7, {"time": 1795253400.0}, None, None, None, None, "latest"]]


def test_the_configuration_has_every_key_with_its_default(tmp_path):
    [table] = [
        t for t in run_page(in_progress(tmp_path, [], versions={"jax": "1"})).tables if t["title"] == "Configuration"
    ]
    rows = {name: (value, default) for name, value, default in table["rows"]}
    assert rows["learning_rate"] == ("0.01", "required") and rows["seed"] == ("42", "42") and rows["jax"] == ("1", "")
    assert rows["mesh"] == ('{"data": 1, "fsdp": 1}', '{"data": -1, "fsdp": 1}')


def test_the_page_of_several_runs_has_a_line_for_each_and_what_differs_between_them():
    configs = [{"seed": 1, "epochs": 2}, {"seed": 1, "epochs": 3}, {"seed": 1, "epochs": 3}]
    records = [Records(record(step, step + i, val_loss=i) for step in (1, 2)) for i in range(3)]
    runs = [ComparedRun(f"run {i}", records[i], configs[i], i != 1) for i in range(3)]
    page = comparison_page("several", runs, {"Results": (["run", "loss"], [[run.name, "1"] for run in runs])}, "tokens")
    usual, apart, norms, *_ = page.charts
    assert [line["name"] for line in usual["lines"]] == ["run 0, training", "run 0", "run 2, training", "run 2"]
    assert [line["name"] for line in apart["lines"]] == ["run 1, training", "run 1"] and "not comparable" in apart[
        "title"
    ]
    assert [(line["run"], line["color"]) for line in norms["lines"]] == [(0, 0), (1, 1), (2, 2)]
    assert page.tables[1]["rows"] == [["epochs", "2", "3", "3"]]
    assert comparison_page("same", runs[2:], {"Results": (["run"], [])}, "tokens").tables == []
    assert page.reload_seconds is None and page.x == "tokens" and len(page.clocks) == 3
