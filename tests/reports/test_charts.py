import ast
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from helpers import ROOT
from matplotlib.figure import Figure

from outside_in.reports import charts

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


def test_the_loss_chart_shows_mean_and_band_of_each_period_and_marks_the_best_validation(tmp_path, drawn):
    records = [record(step, 5 - step / 100 + step % 2) for step in range(1, 101)]
    for step, loss in [(50, 4.0), (75, 3.5), (100, 3.75)]:
        records[step - 1]["val_loss"] = loss
    charts.draw_loss(tmp_path / "chart.png", records, interval=10, title="a run")
    [axes] = drawn
    mean, validation, best = axes.get_lines()
    losses = np.array([r["loss"] for r in records]).reshape(10, 10)
    np.testing.assert_array_equal(mean.get_xdata(), np.arange(10, 101, 10))
    np.testing.assert_allclose(mean.get_ydata(), losses.mean(axis=1))
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert {band.min(), band.max()} == {losses.min(), losses.max()}
    np.testing.assert_array_equal(validation.get_xydata(), [(50, 4.0), (75, 3.5), (100, 3.75)])
    assert best.get_xdata() == [75, 75]
    assert "3.500 at step 75" in best.get_label()


def test_without_validation_the_best_period_goes_by_training_loss(tmp_path, drawn):
    charts.draw_loss(tmp_path / "chart.png", [record(s, abs(s - 7) + 1.0) for s in range(1, 11)], interval=1, title="")
    assert drawn[0].get_lines()[-1].get_xdata() == [7, 7]


@pytest.mark.parametrize(("lowest", "scale"), [(1.0, "linear"), (0.1, "log"), (0.0, "linear")])
def test_the_loss_axis_is_logarithmic_where_losses_differ_much_and_can_be(tmp_path, drawn, lowest, scale):
    records = [record(step, loss) for step, loss in enumerate(np.linspace(5, lowest, 20).tolist(), start=1)]
    draw("loss", tmp_path / "chart.png", records)
    assert drawn[0].get_yscale() == scale


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
