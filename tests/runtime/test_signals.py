import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from outside_in.runtime.signals import REPEAT_SECONDS, StopRequest, listening, raising

pytestmark = pytest.mark.slow

FIRST, SECOND = "stopping soon", "left at once"
PROGRAM = f"""
import hashlib, os, signal, sys, threading, time
from outside_in.runtime.signals import StopRequest, listening

stop = StopRequest()
with listening(stop, {FIRST!r}, {SECOND!r}):
    print("ready", flush=True)
    BODY
print("block ended", stop.received_signal, flush=True)
sys.exit(stop.exit_code)
"""
POLITE = "while not stop: time.sleep(0.01)"
STUCK = {
    "a loop that ignores the request": "while True: time.sleep(1)",
    "a lock": "threading.Event().wait()",
    "C code that never looks at signals": "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)",
}


@pytest.fixture(autouse=True)
def not_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which a started program inherits
    yield
    signal.signal(signal.SIGHUP, before)


def start(body, **options):
    command = [sys.executable, "-c", PROGRAM.replace("BODY", body)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT} | options
    process = subprocess.Popen(command, **options)
    assert process.stdout.readline() == "ready\n"
    return process


def finish(process):
    """Its output, its errors and its exit code; a process that does not end is killed, and its code then -9."""
    with process:
        try:
            return *process.communicate(timeout=10), process.returncode
        except subprocess.TimeoutExpired:
            process.kill()
            return *process.communicate(), process.returncode


def wait_for_first_message(process):
    assert [process.stderr.readline() for _ in range(2)] == ["\n", f"{FIRST}\n"]


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_first_signal_asks_and_the_block_ends_by_itself(number, exit_code):
    process = start(POLITE)
    process.send_signal(number)
    assert finish(process) == (f"block ended {int(number)}\n", f"\n{FIRST}\n", exit_code)


@pytest.mark.parametrize(
    ("first", "second", "exit_code"),
    [(signal.SIGINT, signal.SIGINT, 130), (signal.SIGTERM, signal.SIGINT, 143), (signal.SIGINT, signal.SIGTERM, 130)],
)
@pytest.mark.parametrize("body", STUCK)
def test_the_second_signal_leaves_at_once_whatever_the_main_thread_does(body, first, second, exit_code):
    process = start(STUCK[body])
    process.send_signal(first)
    wait_for_first_message(process)
    if second == first:
        time.sleep(REPEAT_SECONDS + 0.1)
    process.send_signal(second)
    assert finish(process) == ("", f"\n{SECOND}\n", exit_code)


def test_the_second_signal_leaves_also_when_nobody_reads_the_messages():
    process = start(STUCK["a lock"])
    process.stderr.close()  # as when the `tee` behind a pipe got the same Ctrl-C
    process.stderr = None
    for _ in range(2):
        time.sleep(REPEAT_SECONDS + 0.1)  # two signals in one moment count as one
        process.send_signal(signal.SIGINT)
    assert finish(process)[2] == 130


def test_other_signals_are_no_request():
    process = start(f"""
    signal.signal(signal.SIGUSR2, lambda *_: None)
    os.kill(os.getpid(), signal.SIGUSR2)
    time.sleep(0.2)
    print(bool(stop), flush=True)
    {POLITE}""")
    assert process.stdout.readline() == "False\n"
    process.send_signal(signal.SIGINT)
    assert finish(process)[1:] == (f"\n{FIRST}\n", 130)


def test_sigusr1_asks_for_one_checkpoint_and_for_no_stop():
    process = start(f"""
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.2)
    print(bool(stop), stop.take_save_request(), stop.take_save_request(), flush=True)
    {POLITE}""")
    assert process.stdout.readline() == "False True False\n"
    process.send_signal(signal.SIGINT)
    assert finish(process)[1:] == (f"\n{FIRST}\n", 130)


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_afterwards_signals_are_handled_as_before(error):
    def handlers():
        descriptor = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(descriptor)
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)], descriptor

    before, stop = handlers(), StopRequest()
    try:
        with listening(stop, FIRST, SECOND):
            assert handlers() != before
            assert not stop
            if error:
                raise error
    except ZeroDivisionError:
        assert error
    assert handlers() == before


def test_a_hangup_is_ignored_where_it_was_before_as_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which a started program inherits
    try:
        process = start("time.sleep(0.5)")
    finally:
        signal.signal(signal.SIGHUP, before)
    process.send_signal(signal.SIGHUP)
    output, errors, _ = finish(process)
    assert "block ended None" in output and FIRST not in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_twice_in_a_moment_is_one_request(number):
    """As `uv run` sends it, once by itself, when its whole process group gets it: from timeout, say, or a scheduler."""
    process = start(POLITE.replace("0.01", "1"))
    for _ in range(2):
        process.send_signal(number)
        time.sleep(0.1)
    output, errors, code = finish(process)
    assert (code, f"block ended {int(number)}" in output, SECOND in errors) == (128 + number, True, False)


def test_a_hangup_that_comes_twice_is_one_request():
    process = start(POLITE.replace("0.01", "1"))
    for _ in range(2):
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
    output, errors, code = finish(process)
    assert (code, "block ended 1" in output, SECOND in errors) == (129, True, False)


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit), (signal.SIGHUP, SystemExit)],
    ids=str,
)
def test_a_signal_that_is_raised_lets_the_block_clean_up_once(number, error):
    before, cleaned_up = signal.getsignal(number), []
    with pytest.raises(error) as caught, raising():
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)  # as `uv run` sends it
            cleaned_up.append(True)
    assert cleaned_up and signal.getsignal(number) is before
    assert error is KeyboardInterrupt or caught.value.code == 128 + number
