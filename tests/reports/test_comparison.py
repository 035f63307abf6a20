import json

import pytest
from matplotlib.figure import Figure

from outside_in.reports.comparison import compare, labels, not_comparable, read
from outside_in.reports.labels import X_LABELS
from outside_in.storage import metrics
from outside_in.storage.run_directory import RunDirectory

# vocabulary 101, width 32, context 16, one layer: embeddings and head 2·101·32, positions 16·32, three norms 3·2·32,
# attention 3·32² and 32² + 32, feed-forward 4·32² + 128 and 4·32² + 32
TINY_PARAMETERS = 6_464 + 512 + 192 + 3_072 + 1_056 + 4_224 + 4_128
WRITTEN = {"chart": "chart.png", "page": "chart.html"}


def record(step, loss, *, seconds=0.5, rejected_updates=0, **more):
    return {
        **dict.fromkeys(metrics.NUMBERS | metrics.NULLABLE, 1.0),
        "global_step": step,
        "loss": loss,
        "tokens_seen": 128 * step,
        "seconds": seconds,
        "rejected_updates": rejected_updates,
        **more,
    }


@pytest.fixture
def trained(make_run):
    """Make a run with these metrics: `trained("name", records, meta, model={...}, train={...})`."""

    def make(name, records, meta=None, **changes):
        run = RunDirectory(make_run(name, **changes))
        run.metrics.write_text("".join(json.dumps(r) + "\n" for r in records))
        if meta is not None:
            step = (records[-1] | meta)["global_step"]
            checkpoint = run.checkpoints / f"20261121T093000Z-iteration-{step}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "meta.json").write_text(json.dumps(meta))
        return run

    return make


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_holds_the_numbers_that_a_hand_computes(trained, tmp_path):
    first = trained(
        "first",
        [
            *(record(step, 4.0) for step in range(1, 5)),
            record(5, 3.0, val_loss=3.5),
            record(6, 2.0, seconds=9.0),
            record(7, None, rejected_updates=1),
            record(8, 2.5, rejected_updates=1, val_loss=2.0),
        ],
        {"seconds_trained": 3723.4, "global_step": 6},
    )
    second = trained("second", [record(1, 4.5), record(2, 4.25)], model={"n_layers": 0})
    lines = compare([first, second], "tokens", tmp_path / "chart.png")
    names = "run parameters tokens|training loss|validation loss|perplexity|tokens/s|rejected|time"
    assert cells(lines[0]) == ["run", "parameters", *names.split(maxsplit=2)[2].split("|")]
    # the 3 steps after the last milestone, of which one has no loss: (2 + 2.5) / 2; 128 tokens in half a second,
    # mostly; two steps after the checkpoint: 3723.4 + 1 seconds
    expected = ["first", f"{TINY_PARAMETERS:,}", "1,024", "2.2500", "2.0000", "7.389", "256", "1", "1:02:04"]
    assert cells(lines[2]) == expected
    assert cells(lines[3]) == ["second", "7,040", "256", "4.3750", "–", "–", "256", "0", "0:00:01"]
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_says_what_each_run_took_to_a_loss(trained, tmp_path):
    fast = [record(1, 5.0, val_loss=5.0), record(2, 4.5), record(3, 4.0, val_loss=3.0), record(4, 2.0, val_loss=2.0)]
    slow = [record(step, 5.0, seconds=2.0) for step in range(1, 4)]
    slow[2]["val_loss"] = 3.5
    runs = [trained("fast", fast), trained("slow", slow), trained("never", [record(1, 4.0, val_loss=4.0)])]
    lines = compare(runs, "tokens", tmp_path / "chart.png", to_loss=3.5)
    assert cells(lines[0])[-4:] == ["tokens to 3.5", "steps", "time of steps", "FLOPs"]
    # three quarters of the way from step 1 to step 3; 6 · (12 · 32² + 101 · 32) + 12 · 32 · 16 operations a token
    assert cells(lines[2])[-4:] == ["320", "2", "0:00:01", f"{320 * (6 * (12 * 1024 + 3232) + 6144):.2e}"]
    assert cells(lines[3])[-4:-1] == ["384", "3", "0:00:06"]
    assert cells(lines[4])[-4:] == ["–"] * 4


def test_runs_that_differ_in_their_seed_alone_get_a_table_of_means(trained, tmp_path):
    def of(loss, steps=2):
        return [record(step, loss, val_loss=loss) for step in range(1, steps + 1)]

    runs = [
        trained("a-1", of(3.0), train={"seed": 1}),
        trained("a", of(2.0)),
        trained("a-2", of(2.5), train={"seed": 2}),
        trained("a-short", of(9.0, steps=1), train={"seed": 3}),
        trained("b", of(4.0), train={"learning_rate": 0.5}),
    ]
    lines = compare(runs, "tokens", tmp_path / "chart.png", to_loss=3.5)
    start = next(i for i, line in enumerate(lines) if line.startswith("| alike but for the seed"))
    assert cells(lines[start]) == [
        "alike but for the seed", "runs", "mean validation loss", "lowest", "highest", "mean tokens to 3.5"
    ]  # fmt: skip
    assert cells(lines[start + 2]) == ["a", "3", "2.5000", "2.0000", "3.0000", "128"]
    assert not lines[start + 3]
    assert "alike but for the seed" in (tmp_path / "chart.html").read_text()
    assert not any("alike" in line for line in compare(runs[-2:], "tokens", tmp_path / "chart.png"))
    assert "alike but for the seed" not in (tmp_path / "chart.html").read_text()


def test_runs_without_metrics_are_named_and_left_out(trained, make_run, tmp_path):
    lines = compare([RunDirectory(make_run("new")), trained("old", [record(1, 4.0)])], "steps", tmp_path / "chart.png")
    assert [cells(line)[0] for line in lines[2:3]] == ["old"]
    assert any(line.endswith("new: no metrics yet, skipped") for line in lines)


def test_without_any_metrics_there_is_nothing_to_compare(make_run, tmp_path):
    with pytest.raises(ValueError, match="no run has metrics yet"):
        compare([RunDirectory(make_run("new"))], "tokens", tmp_path / "chart.png")
    assert not (tmp_path / "chart.png").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"vocab_size": 100}},
        {"train": {"objective": "a-to-a"}},
        {"train": {"dataset": "elsewhere"}},
        {"train": {"start_val_token": 1}},
    ],
    ids=str,
)
def test_losses_on_other_data_or_another_vocabulary_are_marked(trained, tmp_path, changes):
    usual = [trained(name, [record(1, 4.0)]) for name in ("one", "two")]
    other = trained("other", [record(1, 4.0)], **changes)
    assert [run.run for run in not_comparable([read(run) for run in (other, *usual)])] == [other]
    lines = compare([other, *usual], "tokens", tmp_path / "chart.png")
    assert [cells(line)[0] for line in lines[2:5]] == ["other \\*", "one", "two"]
    assert any("losses are not comparable" in line for line in lines)


def test_runs_on_the_same_data_are_not_marked_whatever_their_size_and_batches(trained, tmp_path):
    runs = [
        trained("one", [record(1, 4.0)], {"seconds_trained": 1}),
        trained("two", [record(1, 4.0)], model={"emb_dim": 64}, train={"microbatch_size": 1}),
    ]
    assert not any("*" in line for line in compare(runs, "tokens", tmp_path / "chart.png"))


def test_a_run_that_never_had_a_finite_loss_stands_in_the_table(trained, tmp_path):
    runs = [trained("lost", [record(1, None, rejected_updates=1)]), trained("good", [record(1, 4.0)])]
    lines = compare(runs, "tokens", tmp_path / "chart.png")
    assert cells(lines[2])[:1] + cells(lines[2])[3:5] == ["lost", "–", "–"]


def test_a_run_is_compared_as_it_was_trained_under_its_overrides(trained):
    records = [*(record(step, 9.0) for step in range(1, 5)), record(5, 3.0), record(6, 2.0)]
    run = trained("run", records, {"overrides": {"checkpoint_interval": 2, "dataset": "elsewhere"}})
    assert read(run).average_loss == 2.5
    assert read(run).place == ("elsewhere", 0, 64)


@pytest.mark.parametrize(
    "meta", ["[]", "{", '{"seconds_trained": null}', "{}", '{"overrides": 1}', '{"overrides": {"seed": "x"}}']
)
def test_a_damaged_checkpoint_does_not_keep_a_run_out_of_the_table(trained, tmp_path, meta):
    run = trained("run", [record(1, 4.0)], {})
    [path] = run.checkpoints.glob("*/meta.json")
    path.write_text(meta)
    assert cells(compare([run], "tokens", tmp_path / "chart.png")[2])[-1] == "0:00:00"


def test_metrics_that_lack_something_are_one_clear_line(trained, tmp_path):
    run = trained("run", [{"global_step": 1, "loss": 4.0, "seconds": 1.0}])
    with pytest.raises(ValueError, match=r"step 1 lacks .*rejected_updates, tokens_seen; "):
        compare([run], "tokens", tmp_path / "chart.png")


def test_runs_of_the_same_name_are_told_apart_by_their_path(trained, tmp_path):
    (tmp_path / "other").mkdir()
    runs = [read(trained(name, [record(1, 4.0)])) for name in ("a", "b", "other/a")]
    assert list(labels(runs[:2]).values()) == ["a", "b"]
    assert list(labels(runs).values()) == [str(tmp_path / name) for name in ("a", "b", "other/a")]


@pytest.fixture
def drawn(monkeypatch):
    """The curves and the label of every comparison that the test draws."""
    calls = []
    monkeypatch.setattr(
        "outside_in.reports.comparison.draw_comparison", lambda path, curves, x_label: calls.append((curves, x_label))
    )
    return calls


@pytest.mark.parametrize(("x", "positions"), [("tokens", [128, 256]), ("steps", [1, 2]), ("seconds", [0.5, 3.5])])
def test_a_curve_runs_over_what_was_asked_for(trained, tmp_path, drawn, x, positions):
    run = trained("run", [record(1, 4.0), record(2, 3.0, seconds=3.0, val_loss=3.5)])
    compare([run], x, tmp_path / "chart.png")
    [([curve], label)] = drawn
    assert (curve.label, label, curve.is_comparable) == ("run", X_LABELS[x], True)
    assert [series.tolist() for series in curve.training] == [positions, [4.0, 3.0]]
    assert [series.tolist() for series in curve.validation] == [positions[1:], [3.5]]


def test_runs_that_are_not_comparable_are_drawn_apart(trained, tmp_path, monkeypatch):
    runs = [trained(name, [record(1, 4.0, val_loss=4.5)]) for name in ("one", "two")]
    runs.append(trained("echo", [record(1, 0.0), record(2, 0.5)], train={"objective": "a-to-a"}))
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **o: figures.append(self) or savefig(self, *a, **o))
    compare(runs, "steps", tmp_path / "chart.png")
    legends = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figures[0].axes]
    assert legends == [["one  4.500", "two  4.500"], ["echo  0.500 (training)"]]
    assert "not comparable" in figures[0].axes[1].get_title()


def test_eleven_runs_can_be_told_apart_and_the_legend_has_their_last_losses_in_order(trained, tmp_path, monkeypatch):
    runs = [trained(f"run-{i}", [record(1, 9.0), record(2, 4.0 + i, val_loss=3.0 + i)]) for i in range(11)]
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **o: figures.append(self) or savefig(self, *a, **o))
    compare(runs, "tokens", tmp_path / "chart.png")
    [axes] = figures[0].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        f"run-{i}  {3 + i:.3f}" for i in range(10, -1, -1)
    ]
    shown = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in shown}) == 11


def test_the_program_expands_folders_and_writes_the_chart(trained, call_program, tmp_path):
    trained("one", [record(1, 4.0)]), trained("two", [record(1, 4.0, val_loss=3.0)])
    finished = call_program("compare_runs", tmp_path, tmp_path / "one" / "..", "--output", tmp_path / "chart.png")
    assert finished.returncode == 0
    assert [cells(line)[0] for line in finished.stdout.splitlines()[2:4]] == ["one", "two"]
    assert finished.stdout.splitlines()[-2:] == [f"{what}: {tmp_path / name}" for what, name in WRITTEN.items()]
    assert '"runs":["one","two"]' in (tmp_path / "chart.html").read_text()


@pytest.mark.parametrize("output", [".", "missing/chart.png"])
def test_an_output_that_cannot_be_written_is_one_clear_line(trained, call_program, output):
    finished = call_program("compare_runs", trained("one", [record(1, 4.0)]).path, "--output", output)
    assert finished.returncode == 2
    assert finished.stderr.startswith(f"error: {output}: expected a file in a folder that exists")


def test_a_chart_that_would_have_the_name_of_the_page_is_one_clear_line(trained, call_program, tmp_path):
    finished = call_program("compare_runs", trained("one", [record(1, 4.0)]).path, "--output", tmp_path / "c.html")
    assert finished.returncode == 2 and not (tmp_path / "c.html").exists()
    assert finished.stderr.startswith(f"error: {tmp_path / 'c.html'}: expected the chart's name")


@pytest.mark.parametrize("name", ["missing", "tokens"])
def test_a_folder_without_runs_is_one_clear_line(call_program, make_run, tmp_path, name):
    finished = call_program("compare_runs", tmp_path / name)
    assert finished.returncode == 2
    assert finished.stderr.startswith(f"error: {tmp_path / name}: expected a run or a folder of runs")
