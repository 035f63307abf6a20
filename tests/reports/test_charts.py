import ast
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from helpers import ROOT
from matplotlib.figure import Figure

from outside_in.reports import charts
from outside_in.reports.series import Series, period_means, thinned
from outside_in.storage.records import Records

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def record(step, loss=3.0, norm=1.0, **more):
    rejected = norm is None
    common = {"learning_rate": step / 1000, "clipped": bool(norm and norm > 3.5), "rejected": rejected}
    return {"global_step": step, "loss": loss, "gradient_norm": norm, **common, **more}


RECORDS = {
    "one": [record(1)],
    "two": [record(1), record(2, 2.5, 2.0)],
    "validated": [record(step, 9 / step, val_loss=10 / step if step % 10 == 0 else None) for step in range(1, 51)],
    "log scale, never validated": [record(step, 10.0 ** (1 - step / 10), 10.0**-step) for step in range(1, 41)],
    "losses of 0": [record(step, max(0.0, 3 - step), 0.0) for step in range(1, 6)],
    "nulls": [record(1), record(2, None, None), record(3, None), record(4, 2.0, None), record(5)],
    "rejected first": [record(1, None, None), record(2)],
    "long": [record(step, 3.0 + np.sin(step)) for step in range(1, 2001)],
}


def draw(chart, path, records):
    records = Records(records)
    if chart == "loss":
        charts.draw_loss(path, records, interval=10, title="a run", reference_losses={"uniform": 4.6, "unigram": 4.1})
    elif chart == "learning rate":
        charts.draw_learning_rate(path, records, title="a run")
    else:
        charts.draw_gradient_norm(path, records, clipping_max_norm=3.5, title="a run")


def check_png(path):
    assert path.read_bytes().startswith(PNG_MAGIC)
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[:2] == (600, 1080)
    assert len(np.unique(np.uint8(255 * pixels).view(np.uint32))) > 10  # colours, as RGBA in one number


@pytest.fixture
def drawn(monkeypatch):
    """The axes of every chart that the test draws."""
    axes, add_subplot = [], Figure.add_subplot
    monkeypatch.setattr(Figure, "add_subplot", lambda self: axes.append(add_subplot(self)) or axes[-1])
    return axes


@pytest.mark.parametrize("records", RECORDS)
@pytest.mark.parametrize("chart", ["loss", "learning rate", "gradient norm"])
def test_a_chart_of_any_run_is_a_picture_and_nothing_else_is_left(tmp_path, chart, records):
    path = tmp_path / "chart.png"
    draw(chart, path, RECORDS[records])
    check_png(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("chart", ["learning rate", "gradient norm"])
def test_a_chart_without_any_measurement_is_still_a_picture(tmp_path, chart):
    draw(chart, tmp_path / "chart.png", [record(1, None, None)])
    check_png(tmp_path / "chart.png")


@pytest.mark.parametrize("records", [[], [record(1, None, None)]])
def test_without_any_loss_the_loss_chart_stays_as_it_is(tmp_path, records):
    draw("loss", tmp_path / "chart.png", records)
    assert list(tmp_path.iterdir()) == []


def test_the_loss_chart_shows_every_step_the_mean_of_each_period_in_its_middle_and_the_best_validation(tmp_path, drawn):
    records = [record(step, 5 - step / 100 + step % 2) for step in range(1, 101)]
    for step, loss in [(50, 4.0), (75, 3.5), (100, 3.75)]:
        records[step - 1]["val_loss"] = loss
    charts.draw_loss(tmp_path / "chart.png", Records(records), interval=10, title="a run")
    every, mean, validation, best = drawn[0].get_lines()
    losses = np.array([r["loss"] for r in records])
    np.testing.assert_array_equal(every.get_xydata(), list(enumerate(losses, start=1)))
    np.testing.assert_array_equal(mean.get_xdata(), np.arange(5.5, 101, 10))
    np.testing.assert_allclose(mean.get_ydata(), losses.reshape(10, 10).mean(axis=1))
    np.testing.assert_array_equal(validation.get_xydata(), [(50, 4.0), (75, 3.5), (100, 3.75)])
    assert best.get_xdata() == [75, 75]
    assert best.get_label() == "best validation loss: 3.500 at step 75"


def test_without_validation_the_best_period_goes_by_training_loss_and_says_so(tmp_path, drawn):
    records = Records([record(s, abs(s - 7) + 1.0) for s in range(1, 11)])
    charts.draw_loss(tmp_path / "chart.png", records, interval=1, title="")
    best = drawn[0].get_lines()[-1]
    assert best.get_xdata() == [7, 7]
    assert best.get_label() == "best training loss (every step): 1.000 at step 7"


@pytest.mark.parametrize(("lowest", "scale"), [(1.0, "linear"), (0.1, "log"), (0.0, "log")])
def test_the_loss_axis_is_logarithmic_where_losses_differ_much(tmp_path, drawn, lowest, scale):
    records = [record(step, loss) for step, loss in enumerate(np.linspace(5, lowest, 20).tolist(), start=1)]
    draw("loss", tmp_path / "chart.png", records)
    assert drawn[0].get_yscale() == scale
    every = drawn[0].get_lines()[1 if lowest == 0 else 0]
    assert len(every.get_ydata()) == 20 and np.isfinite(every.get_ydata()).all()  # a loss of 0 too
    assert (min(every.get_ydata()) >= drawn[0].get_ylim()[0]) and (
        "0 stands at the lower" in str(legend(drawn[0]))
    ) == (lowest == 0)


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize("chart", ["loss", "learning rate", "gradient norm"])
@pytest.mark.parametrize("num_steps", [1, 3, 5, 20])
def test_charts_of_few_steps_have_whole_distinct_ticks_and_a_marker_for_each_point(tmp_path, drawn, chart, num_steps):
    draw(chart, tmp_path / "chart.png", [record(step, tokens_seen=64 * step) for step in range(1, num_steps + 1)])
    [axes] = drawn
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert ticks and ticks == sorted({round(tick) for tick in ticks})
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert len(labels) == len(set(labels))
    assert any(line.get_marker() == "." for line in axes.get_lines())


def test_tokens_stand_above_the_steps(tmp_path, drawn):
    draw("loss", tmp_path / "chart.png", [record(step, tokens_seen=500_000 * step) for step in range(1, 5)])
    [above] = drawn[0].child_axes
    drawn[0].figure.draw_without_rendering()
    assert above.get_xlabel() == "training tokens"
    assert "1M" in [label.get_text() for label in above.get_xticklabels()]


@pytest.mark.parametrize("clip", [1e-6, 1e6])
def test_the_clip_line_never_decides_the_scale(tmp_path, drawn, clip):
    records = Records([record(step, norm=1 + step / 10) for step in range(1, 21)])
    for max_norm in (None, clip):
        charts.draw_gradient_norm(tmp_path / "chart.png", records, clipping_max_norm=max_norm, title="")
    assert drawn[0].get_ylim() == drawn[1].get_ylim()
    assert any(f"clip at {clip:g}" in text for text in legend(drawn[1]))


def test_a_long_line_is_thinned_to_its_lowest_and_highest_points():
    series = Series(np.arange(1.0, 1_000_001), np.sin(np.arange(1_000_000)))
    series.y[[123_456, 654_321]] = 7, -7
    short = thinned(series)
    assert len(short.x) <= 2_002
    assert {7, -7} < set(short.y) and (np.diff(short.x) > 0).all()
    np.testing.assert_array_equal(short.x[[0, -1]], [1, 1_000_000])
    np.testing.assert_array_equal(series.y[short.x.astype(int) - 1], short.y)


def test_a_period_stands_in_its_middle_also_where_steps_lack():
    steps = np.array([1.0, 2, 3, 4, 9, 10])
    means = period_means(Series(steps, steps * 2), (steps - 1) // 4)
    np.testing.assert_array_equal(means.x, [2.5, 9.5])
    np.testing.assert_array_equal(means.y, [5, 19])


def test_the_learning_rate_chart_shows_every_step(tmp_path, drawn):
    draw("learning rate", tmp_path / "chart.png", RECORDS["validated"])
    np.testing.assert_array_equal(drawn[0].get_lines()[0].get_xydata(), [(s, s / 1000) for s in range(1, 51)])


def test_the_gradient_norm_chart_shows_the_clip_line_and_every_rejected_step(tmp_path, drawn):
    norms = [1.0, 4.0, None, 8.0, None]
    draw("gradient norm", tmp_path / "chart.png", [record(step, norm=norm) for step, norm in enumerate(norms, start=1)])
    norm, clip, rejected = drawn[0].get_lines()
    np.testing.assert_array_equal(norm.get_xydata(), [(1, 1.0), (2, 4.0), (4, 8.0)])
    assert clip.get_ydata() == [3.5, 3.5] and "2 of 5 steps clipped" in clip.get_label()
    assert list(rejected.get_xdata()) == [3, 5] and "2 rejected" in rejected.get_label()


@pytest.mark.parametrize("chart", ["loss", "learning rate", "gradient norm"])
def test_a_failing_write_leaves_the_chart_before_it(tmp_path, monkeypatch, chart):
    path = tmp_path / "chart.png"
    draw(chart, path, RECORDS["two"])
    before = path.read_bytes()

    def fail(self, target, **options):
        target.write_bytes(PNG_MAGIC)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="No space"):
        draw(chart, path, RECORDS["validated"])
    assert path.read_bytes() == before
    monkeypatch.undo()
    draw(chart, path, RECORDS["validated"])  # nothing in the way of the next one
    assert path.read_bytes() != before
    assert list(tmp_path.iterdir()) == [path]


def test_charts_never_touch_jax():
    tree = ast.parse((ROOT / "outside_in" / "reports" / "charts.py").read_text())
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    assert "jax" not in [alias.name.split(".")[0] for node in imported for alias in node.names]
    check = "import sys, outside_in.reports.charts; sys.exit(bool({'jax', 'flax'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, timeout=60).returncode == 0
