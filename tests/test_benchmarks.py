"""The benchmarks that need no PyTorch, on a tiny shape: what they report, and that both loops train the same."""

import io
import itertools
import json

import compare
import pytest
import shapes
from helpers import CONTEXT_LENGTH, VOCAB_SIZE, complaint, random_tokens
from safetensors.numpy import save_file

from outside_in.reports.cards import COMPILE_ONLY

pytestmark = pytest.mark.slow

STEPS = 3
SHAPE = {
    "--layers": 1,
    "--width": 32,
    "--heads": 4,
    "--context": CONTEXT_LENGTH,
    "--vocab": VOCAB_SIZE,
    "--microbatch": 2,
    "--accumulation": 2,
    "--steps": STEPS,
}
ARGUMENTS = [*itertools.chain(*SHAPE.items())]


@pytest.fixture
def report(call_program):
    def run(name, *arguments):
        finished = call_program(name, *ARGUMENTS, *arguments)
        assert finished.returncode == 0, finished.stderr
        return json.loads(finished.stdout)

    return run


def test_both_jax_loops_train_the_same_and_report_the_same_keys(report, tmp_path):
    weights, tokens = tmp_path / "model.safetensors", tmp_path / "tokens.safetensors"
    save_file({"tokens": random_tokens(1000)}, tokens)
    ours = report("throughput", "--tokens", tokens, "--save-weights", weights)
    theirs = report("dispatch_per_microbatch", "--tokens", tokens, "--weights", weights, "--seed", 1)
    assert ours.keys() - theirs.keys() == {"needed_device_bytes"} and theirs.keys() <= ours.keys()
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-4)
    assert len(ours["losses"]) == 1 + STEPS
    assert len(set(ours["losses"])) == 1 + STEPS  # it trained


def test_the_report_says_what_was_trained_and_how_fast(report):
    told = report("throughput")
    assert told["parameters"] == (2 * VOCAB_SIZE + CONTEXT_LENGTH) * 32 + 12 * 32**2 + 4 * 32 + 6 * 32 + 2 * 32
    assert told["tokens_per_second"] == 2 * 2 * CONTEXT_LENGTH / sorted(told["step_seconds"])[STEPS // 2]
    assert told["peak_host_bytes"] > 10_000_000


def test_the_speeds_of_rungs_are_by_that_of_the_first(call_program, make_run, tmp_path):
    for name, train in (("01", {}), ("02", {"gradient_accumulation_steps": 2, "microbatches_per_call": 1})):
        make_run(name, train=train)
    finished = call_program("rungs", tmp_path, "--rounds", 2, "--steps", 2)
    assert finished.returncode == 0, finished.stderr
    rungs = json.loads(finished.stdout)["rungs"]
    assert list(rungs) == ["01", "02"] and rungs["01"]["by_the_first"]["max"] == 1
    assert rungs["02"]["tokens_per_second"] > 0 and rungs["02"]["by_the_first"]["min"] > 0
    (tmp_path / "empty").mkdir()
    assert "found no train.json there" in complaint(call_program("rungs", tmp_path / "empty"))


def test_a_trace_leaves_the_compiled_program_and_the_kernels_in_its_folder(call_program, tmp_path):
    finished = call_program("kernel_times", tmp_path, *ARGUMENTS)
    assert finished.returncode == 0, finished.stderr
    assert "ENTRY" in (tmp_path / "step.hlo").read_text()
    assert json.loads((tmp_path / "kernels.json").read_text()) == []  # of a GPU
    assert "ms a step" in finished.stdout


def test_arguments_override_parts_of_a_shape():
    options = ["--shape", "gpt2-small", "--tied", "--precision", "bfloat16", "--microbatch", "32"]
    model, train = shapes.configs(shapes.make_parser("").parse_args(options))
    assert (model.n_layers, model.tied_head, model.vocab_size) == (12, True, 50257)
    assert (train.precision, train.microbatch_size, train.gradient_accumulation_steps) == ("bfloat16", 32, 2)


def test_a_round_is_trained_for_every_line_of_standard_input(call_program, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("3\n4\n"))
    finished = call_program("throughput", *ARGUMENTS, "--rounds-from-stdin")
    rounds = [json.loads(line) for line in finished.stdout.splitlines()]
    assert [len(told["step_seconds"]) for told in rounds] == [3, 4]
    assert [len(told["losses"]) for told in rounds] == [1 + 3, 1 + 3 + 4]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--width", 30], "the arguments: emb_dim=30 is not divisible by n_heads=4; use 28 or change n_heads"),
        (["--microbatch", 0], "microbatch_size: expected"),
        (["--steps", 2], "--steps: expected at least 3, got 2"),
        (["--tokens", "README.md"], "README.md: not a readable safetensors file"),
        (["--shape", "gpt3"], "invalid choice: 'gpt3'"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(call_program, arguments, named):
    assert named in complaint(call_program("throughput", *ARGUMENTS, *arguments))


@pytest.mark.parametrize(
    ("tokens", "vocab"), [(random_tokens(64), VOCAB_SIZE), (random_tokens(1000), VOCAB_SIZE - 1)], ids=["few", "large"]
)
def test_tokens_that_do_not_fit_are_refused(call_program, tmp_path, tokens, vocab):
    tokens[0] = VOCAB_SIZE - 1
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    arguments = [*ARGUMENTS, "--vocab", vocab, "--tokens", tmp_path / "tokens.safetensors"]
    assert "expected more than 64 `tokens`" in complaint(call_program("throughput", *arguments))


class Diary:
    """A contender that only writes down what is asked of it."""

    def __init__(self, steps_ahead):
        self.steps_ahead, self.entries, self.count = steps_ahead, [], 0

    def place_batch(self):
        self.entries.append("place")

    def start_step(self):
        self.count += 1
        self.entries.append(f"start {self.count}")
        return self.count, 0.25 * self.count

    def loss(self, started):
        self.entries.append(f"loss {started}")
        return float(started)


@pytest.mark.parametrize(
    ("steps_ahead", "order"),
    [
        (0, "start 1, place, loss 1, start 2, place, loss 2, start 3, place, loss 3"),
        (1, "start 1, place, start 2, place, loss 1, start 3, place, loss 2, loss 3"),
    ],
)
def test_a_step_is_read_as_late_as_it_may_be(steps_ahead, order):
    diary = Diary(steps_ahead)
    losses, seconds, dispatch_seconds = shapes.time_steps(diary, 3)
    assert ", ".join(diary.entries) == order
    assert losses == [1, 2, 3] and len(seconds) == 3 and dispatch_seconds == 0.5


def test_random_tokens_are_below_the_vocabulary_and_skewed():
    model, train = shapes.configs(shapes.make_parser("").parse_args(["--vocab", "65536", "--microbatch", "1"]))
    tokens = shapes.load_tokens(shapes.make_parser("").parse_args([]), model, train)
    assert tokens.dtype == "uint16" and tokens.max() > 60_000
    assert (tokens < 256).mean() > 0.4


def test_ratios_are_told_by_their_median_and_spread():
    assert compare.spread([1.3, 1.0, 1.1, 1.2, 2.0]) == {
        "median": 1.2,
        "lower_quartile": 1.1,
        "upper_quartile": 1.3,
        "min": 1.0,
        "max": 2.0,
    }


def test_what_follows_two_dashes_is_for_the_programs(monkeypatch):
    monkeypatch.setattr("sys.argv", ["compare.py", "a", "b", "--pairs", "3", "--", "--shape", "S"])
    assert shapes.split_arguments() == (["a", "b", "--pairs", "3"], ["--shape", "S"])
    monkeypatch.setattr("sys.argv", ["compare.py", "a", "b"])
    assert shapes.split_arguments() == (["a", "b"], [])


PROGRAM = """
ENTRY %main (a: bf16[64,32], b: bf16[32,16]) -> f32[64,16] {
  %a = bf16[64,32]{1,0} parameter(0)
  %b = bf16[32,16]{1,0} parameter(1)
  %dot.1 = bf16[64,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}
  ROOT %copy.2 = bf16[64,16]{1,0} copy(%dot.1)
}
"""


def test_a_roofline_of_a_compiled_program_can_be_compared_with_another(call_program, monkeypatch, tmp_path):
    for name in COMPILE_ONLY:
        monkeypatch.setenv(name, "")  # the program sets them; they shall not outlive the test
    (tmp_path / "before.hlo").write_text(PROGRAM)
    one_copy_more = "\n  ROOT %copy.3 = bf16[64,16]{1,0} copy(%copy.2)\n}"
    (tmp_path / "now.hlo").write_text(PROGRAM.replace("ROOT ", "").replace("\n}", one_copy_more))
    rates = ["--tflops", 1e-6, "--terabytes", 1e-6]  # a million operations and bytes a second

    def roofline(name, *more):
        finished = call_program("roofline", "--hlo", tmp_path / name, *ARGUMENTS, *rates, *more)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    roofline("before.hlo", "--json", tmp_path / "before.json")
    before = json.loads((tmp_path / "before.json").read_text())
    assert before["kinds"] == {
        "products": {"milliseconds": 65.536, "kernels": 1, "gigabytes": 7.168e-6, "teraflops": 65.536e-9},
        "copies": {"milliseconds": pytest.approx(4.096), "kernels": 1, "gigabytes": 4.096e-6, "teraflops": 0},
    }
    assert before["bound_milliseconds"] == pytest.approx(65.536 + 4.096)
    assert list(before["each"])[1] == "copies: copy bf16[64,16]{1,0}"
    compared = roofline("now.hlo", "--vs", tmp_path / "before.json")
    assert "69.63 ms before, 73.73 now" in compared
    assert compared.splitlines()[-1].split() == [
        "+4.096",
        "+1",
        "+0.00",
        "+0.00",
        "copies:",
        "copy",
        "bf16[64,16]{1,0}",
    ]
