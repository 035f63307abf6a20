"""`samples.txt`: a line for each completion, and the cut on resume."""

import os

import pytest

from outside_in.storage import samples


@pytest.fixture
def path(tmp_path):
    return tmp_path / "samples.txt"


def test_each_completion_is_one_line_with_its_step(path):
    samples.append(path, 25, ["Every effort moves you"])
    samples.append(path, 50, ["Every effort – ü", "Every other"])
    lines = ["step 25 | Every effort moves you", "step 50 | Every effort – ü", "step 50 | Every other"]
    assert path.read_text(encoding="utf-8") == "".join(f"{line}\n" for line in lines)


@pytest.mark.parametrize("line_break", ["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029"])
def test_line_breaks_collapse(path, line_break):
    samples.append(path, 25, [f"one{line_break}two"])
    assert path.read_text(encoding="utf-8").splitlines() == [r"step 25 | one\ntwo"]


@pytest.mark.parametrize(("step", "kept"), [(0, []), (25, [25]), (99, [25, 50]), (100, [25, 50, 100])])
def test_the_cut_keeps_the_completions_up_to_the_step(path, step, kept):
    for saved in (25, 50, 100):
        samples.append(path, saved, [f"step 7 | at {saved}\nstep 7 | more"])
    samples.cut_after(path, step)
    steps = [int(line.split()[1]) for line in path.read_text().splitlines()]
    assert steps == kept


def test_the_cut_leaves_what_the_user_wrote(path):
    path.write_text("my notes\nstep 25 | a\nstep x\n")
    samples.cut_after(path, 0)
    assert path.read_text() == "my notes\nstep x\n"


def test_a_line_torn_by_a_kill_does_not_swallow_the_next_completion(path):
    path.write_text("step 25 | a\nstep 5")
    samples.cut_after(path, 25)
    samples.append(path, 50, ["b"])
    assert "step 50 | b" in path.read_text().splitlines()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_refused_without_waiting_for_it(path, make):
    make(path)
    with pytest.raises(ValueError, match="got a folder or a device"):
        samples.cut_after(path, 0)


def test_the_cut_leaves_no_other_file_behind(path):
    samples.cut_after(path, 5)
    assert not path.exists()
    samples.append(path, 25, ["a"])
    samples.cut_after(path, 25)
    assert list(path.parent.iterdir()) == [path]
