"""Prove that a run resumes exactly: `uv run prove_resume.py runs/NAME --kills 20`.

A short twin of the run is trained in a temporary folder, undisturbed. Another twin is killed (SIGKILL) again and again,
while starting, stepping and saving, and resumed each time. At the end both must be the same, bit for bit. If it ends
before all kills are done, one more is trained and killed.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import checkpointing
from outside_in.config import ModelConfig, TrainConfig, tokens_per_global_step
from outside_in.config_files import load_config
from outside_in.reports import markdown
from outside_in.runtime import cli
from outside_in.runtime.progress import Progress
from outside_in.storage import metrics
from outside_in.storage.run_directory import RunDirectory
from outside_in.storage.text import counted

TRAIN = Path(__file__).with_name("train.py")
PHASES = ("starting", "stepping", "saving")
CHECKPOINTS = 10  # in a twin's run
POLL = 0.001  # seconds


@dataclass(frozen=True)
class Kill:
    phase: str  # one of PHASES
    step: int  # how far the metrics had come
    lost_steps: int  # that the next start has to do again
    tore_a_save: bool


def main(args: argparse.Namespace) -> int:
    run = RunDirectory(args.run)
    run.check()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="prove-resume-") as scratch:
        alone = write_twin(run, Path(scratch) / "alone", args.steps)
        print(f"training the undisturbed twin: {counted(args.steps, 'step')}, in {scratch}", flush=True)
        seconds = train_alone(alone)
        kills, rows = [], []
        plan = [PHASES[i % len(PHASES)] for i in range(args.kills)]
        rng.shuffle(plan)
        with Progress(total=args.kills, unit="kill") as bar:
            while len(kills) < args.kills and not any(difference for *_, difference in rows):
                killed = write_twin(run, Path(tempfile.mkdtemp(dir=scratch)) / "killed", args.steps)
                kills += train_and_kill(killed, plan[len(kills) :], args.steps, seconds, rng, bar)
                if not kills:
                    raise RuntimeError(
                        f"a run of {counted(args.steps, 'step')} ends before it can be killed; use more --steps"
                    )
                rows = compare(alone, killed)
    print(*kill_table(kills), "", *comparison_table(rows), "", sep="\n")
    different = [name for name, _, difference in rows if difference]
    print(f"{'different' if different else 'identical'} after {counted(len(kills), 'kill')}")
    return cli.FAILED if different else cli.DONE


def write_twin(run: RunDirectory, folder: Path, steps: int) -> RunDirectory:
    """Write a run folder with another run's configs, `steps` global steps long. It has a checkpoint every few steps."""
    model_config, config = load_config(run.model_config, ModelConfig), load_config(run.train_config, TrainConfig)
    mesh = {"data": 1, "fsdp": config.mesh.fsdp}
    train = config.model_dump() | {
        "mesh": mesh,
        "min_train_tokens": steps * tokens_per_global_step(model_config, config, config.mesh.fsdp),
        "epochs": 1,
        "checkpoint_interval": max(1, steps // CHECKPOINTS),
    }
    if config.initial_weights is not None and (local := run.path / config.initial_weights).is_file():
        train["initial_weights"] = str(local.absolute())
    twin = RunDirectory(folder)
    folder.mkdir()
    twin.model_config.write_bytes(run.model_config.read_bytes())
    twin.train_config.write_text(json.dumps(train))
    return twin


@contextmanager
def training(run: RunDirectory) -> Iterator[subprocess.Popen[bytes]]:
    """Run `train.py` on a run folder while the block runs.

    Ctrl-C does not reach it, and it never outlives the block.
    """
    with run.path.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen([sys.executable, TRAIN, run.path], stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def last_write(path: Path) -> int:
    """Return when a file was last written, in ns; 0 without one."""
    return path.stat().st_mtime_ns if path.exists() else 0


def train_to_the_end(run: RunDirectory) -> None:
    with training(run) as process:
        if process.wait() != cli.DONE:
            raise RuntimeError(last_line(run))


def last_line(run: RunDirectory) -> str:
    lines = run.path.with_suffix(".log").read_text(errors="replace").replace("\r", "\n").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["train.py printed nothing"])[-1]


def train_alone(run: RunDirectory) -> dict[str, float]:
    """Train to the end; return each phase's longest time in seconds."""
    started, first_step, saves = time.monotonic(), 0.0, [0.0]
    with training(run) as process:
        saving_since = None
        while process.poll() is None:
            if not first_step and steps_done(run):
                first_step = time.monotonic() - started
            if is_saving(run):
                saving_since = saving_since or time.monotonic()
            elif saving_since:
                saves.append(time.monotonic() - saving_since)
                saving_since = None
            time.sleep(POLL)
        if process.returncode != cli.DONE:
            raise RuntimeError(last_line(run))
    steps = [record["seconds"] for record in metrics.read(run.metrics)[1:]]
    return {"starting": first_step, "stepping": max(steps, default=0.0), "saving": max(saves)}


def train_and_kill(
    run: RunDirectory, plan: list[str], steps: int, seconds: dict[str, float], rng: random.Random, bar: Progress
) -> list[Kill]:
    """Kill a run in each phase of `plan`, then let it end.

    The kills are spread over its length. A run that is too fast ends after fewer, or none.
    """
    done = []
    for target, phase in zip(sorted(rng.randrange(steps) for _ in plan), plan):
        before = last_write(run.metrics)
        with training(run) as process:
            if phase != "starting":  # a process that has loaded its checkpoint cuts the metrics after it
                wait_for(process, lambda before=before: last_write(run.metrics) != before)
                wait_for(process, lambda step=target: steps_done(run) >= step)
            if phase == "saving":
                wait_for(process, lambda: is_saving(run))
            time.sleep(rng.uniform(0, seconds[phase]))
            if process.poll() is not None:
                if process.returncode != cli.DONE:
                    raise RuntimeError(last_line(run))
                break
        found = checkpointing.find_checkpoints(run.checkpoints)
        reached = steps_done(run)
        lost = max(0, reached - (found[-1].global_step if found else 0))
        done.append(Kill(phase, reached, lost, phase != "starting" and is_saving(run)))
        bar.update()
    train_to_the_end(run)
    return done


def wait_for(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    while process.poll() is None and not condition():
        time.sleep(POLL)


def steps_done(run: RunDirectory) -> int:
    try:
        return run.metrics.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def is_saving(run: RunDirectory) -> bool:
    return any(run.checkpoints.glob(f"{checkpointing.STAGING}*"))


def compare(alone: RunDirectory, killed: RunDirectory) -> list[tuple[str, str, str]]:
    """Compare two finished runs.

    A row has what was compared, how much there is of it, and the first difference, or "".
    """
    newest = [checkpointing.find_checkpoints(run.checkpoints)[-1] for run in (alone, killed)]
    for checkpoint in newest:
        checkpointing.verify(checkpoint)
    left, right = (checkpointing.read(checkpoint) for checkpoint in newest)
    records = [metrics.read(run.metrics) for run in (alone, killed)]
    series = [
        [{key: value for key, value in record.items() if not key.endswith("seconds")} for record in run]
        for run in records
    ]
    data = [[record["data_crc32"] for record in run] for run in records]
    samples = [run.samples.read_bytes().splitlines() if run.samples.exists() else [] for run in (alone, killed)]
    kept = [
        [(c.global_step, c.is_best) for c in checkpointing.find_checkpoints(r.checkpoints)] for r in (alone, killed)
    ]
    return [
        ("parameters", f"{len(left.weights)} arrays", _array_difference(left.weights, right.weights)),
        ("optimizer state", f"{len(left.optimizer)} arrays", _array_difference(left.optimizer, right.optimizer)),
        ("metrics", f"{len(series[0])} steps", _difference(*series)),
        ("data consumed", f"{len(data[0])} checksums", _difference(*data)),
        ("samples", f"{len(samples[0])} lines", _difference(*samples)),
        ("checkpoints kept", f"{len(kept[0])}", _difference(*kept)),
    ]


def _array_difference(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> str:
    def bits(arrays: dict[str, np.ndarray], name: str) -> object:
        return name in arrays and (arrays[name].dtype, arrays[name].shape, arrays[name].tobytes())

    names = [name for name in sorted(left.keys() | right.keys()) if bits(left, name) != bits(right, name)]
    return f"{len(names)} differ, such as {names[0]}" if names else ""


def _difference(left: list, right: list) -> str:
    for i, (one, other) in enumerate(zip(left, right), start=1):
        if one != other:
            return f"number {i} differs: {one} and {other}"
    return "" if len(left) == len(right) else f"{len(left)} and {len(right)} of them"


def kill_table(kills: list[Kill]) -> list[str]:
    rows = []
    for phase in PHASES:
        of_phase = [kill for kill in kills if kill.phase == phase]
        torn, lost = sum(kill.tore_a_save for kill in of_phase), max((k.lost_steps for k in of_phase), default=0)
        rows.append([phase, str(len(of_phase)), str(torn), str(lost)])
    return ["", *markdown.table(["killed while", "kills", "saves interrupted", "steps repeated, at most"], rows)]


def comparison_table(rows: list[tuple[str, str, str]]) -> list[str]:
    compared = [(name, amount, difference or "identical") for name, amount, difference in rows]
    return markdown.table(["compared", "amount", "with the undisturbed run"], compared, left=3)


def count(text: str) -> int:
    """Parse a number of at least 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def make_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(
        description="Kill a short twin of a run at random moments, resume it each time, and compare it bit for bit "
        "with an undisturbed twin. The run's folder is not touched; the twins live in a temporary folder "
        "(set TMPDIR for another disk)."
    )
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--kills", type=count, default=10, help="number of kills (10)")
    parser.add_argument("--steps", type=count, default=40, help="length of the twins in global steps (40)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments (0)")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the twin being trained ends as well
    cli.run(main, make_parser())
