"""Kills a save before every single file operation, then looks at what is left; `test_crash_points.py` runs this.

Two kinds of points: operations that Python shows to audit hooks, and system calls, which also show what tensorstore and
safetensors do in native code. A victim is killed right before its first operation at which none has been killed yet,
until one gets through. Points go by name, not by number: Orbax's threads and the number of its files differ from save
to save. For the same reason strace is no help, since it counts the calls of every thread on their own; here the kernel
holds each call until this program answers (https://docs.kernel.org/userspace-api/seccomp_filter.html, "Userspace
Notification").

Nothing here starts a jax backend before it has forked for the last time: forking is safe, and a victim costs 0.1 s.
"""

import collections
import ctypes
import fcntl
import json
import multiprocessing
import os
import re
import select
import shutil
import signal
import socket
import struct
import sys
import threading
import traceback
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from checkpointing import copy_to_host, find_checkpoints, load, prune, save, select_checkpoint, verify

WORKERS = 2  # an even share of the points each
MAX_POINTS = 300  # of one worker and kind
VICTIM_SECONDS = 60  # a save takes far less than one
BEST = {1, 3, 4}  # steps; 1 and 2 are committed before a victim saves 3
LEGITIMATE = ([1, 2], [1, 2, 3], [2, 3], [3])  # steps that may be left
KEEP = 1
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
RANDOM = re.compile(r"[0-9a-f]{32}|\d{8}T\d{6}Z|(?<=\.tmp)\w{6}$")  # tensorstore's, ours, safetensors'


class Tiny(nnx.Module):
    def __init__(self, value):
        self.matrix = nnx.Param(jnp.full((3, 2), value, jnp.float32))
        self.scalar = nnx.Param(jnp.float32(value))


def build(value):
    model = Tiny(value)
    return model, nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)


def commit(folder, step, states):
    checkpoint = save(folder, states[step], {"global_step": step, "is_best": step in BEST}, "{}")
    prune(folder, KEEP)
    return checkpoint


def prepare(template):
    """Commit steps 1 and 2; return what a model and its optimizer hold at each of the four steps."""
    states = {}
    for step in range(1, 5):
        model, optimizer = build(step)
        optimizer.update(model, jax.tree.map(lambda array, step=step: array / (2 + step), nnx.state(model, nnx.Param)))
        states[step] = copy_to_host(model, optimizer)
    template.mkdir()
    for step in (1, 2):
        commit(template, step, states)
    leftover = template / ".staging-of-an-earlier-kill"
    leftover.mkdir()
    (leftover / "file").touch()
    for link in ("latest", "best"):
        (template / f".{link}.tmp").symlink_to("nowhere")
    return states


class Points:
    """Names the operations of one victim on files of its folder, and finds the one to be killed at."""

    def __init__(self, folder, worker, done):
        self.folder, self.worker, self.done = folder, worker, done
        self.seen = collections.Counter()

    def fatal(self, operation, path):
        """Return the name of this operation when the victim is to be killed before it, else None."""
        if not path.is_relative_to(self.folder):
            return None
        operation = f"{operation} {RANDOM.sub('*', str(path.relative_to(self.folder)))}"
        self.seen[operation] += 1
        name = f"{operation} #{self.seen[operation]}"
        return name if zlib.crc32(name.encode()) % WORKERS == self.worker and name not in self.done else None


def descriptor_path(descriptor, process="self"):
    return Path(f"/proc/{process}/fd/{descriptor}").readlink()


# Operations that Python shows

AUDITED = {  # event: the argument that is a path, the one that is the descriptor of a folder which it is relative to
    "open": (0, None),
    "os.chmod": (0, 2),
    "os.link": (1, 3),
    "os.mkdir": (0, 2),
    "os.remove": (0, 1),
    "os.rename": (0, 2),
    "os.rmdir": (0, 1),
    "os.symlink": (1, 2),
    "os.truncate": (0, None),
}


def watch_python(points, parent):
    """From now on, tell the parent of the first fatal operation and die."""
    lock = threading.Lock()

    def die_before(operation, path):
        with lock:
            if name := points.fatal(operation, path):
                parent.send(name.encode())
                os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, arguments):
        if event not in AUDITED or (event == "open" and not arguments[2] & WRITING):
            return
        path_argument, folder_argument = AUDITED[event]
        path = arguments[path_argument]
        path = descriptor_path(path) if isinstance(path, int) else Path(os.fsdecode(path))
        if folder_argument and arguments[folder_argument] >= 0:
            path = descriptor_path(arguments[folder_argument]) / path
        die_before(event, path)

    def watched(name):
        function = getattr(os, name)

        def call(descriptor):
            die_before(f"os.{name}", descriptor_path(descriptor))
            return function(descriptor)

        return call

    for name in ("fsync", "fdatasync"):
        setattr(os, name, watched(name))
    sys.addaudithook(hook)


def await_python(points, messages, victim):
    return messages.recv(1000).decode()


# System calls

SYSTEM_CALLS = {  # number on x86-64: name, as above; None for both where the first argument is an open file
    1: ("write", None, None),
    2: ("open", 0, None),
    18: ("pwrite64", None, None),
    20: ("writev", None, None),
    74: ("fsync", None, None),
    75: ("fdatasync", None, None),
    76: ("truncate", 0, None),
    77: ("ftruncate", None, None),
    82: ("rename", 0, None),
    83: ("mkdir", 0, None),
    84: ("rmdir", 0, None),
    85: ("creat", 0, None),
    86: ("link", 1, None),
    87: ("unlink", 0, None),
    88: ("symlink", 1, None),
    90: ("chmod", 0, None),
    91: ("fchmod", None, None),
    257: ("openat", 1, 0),
    258: ("mkdirat", 1, 0),
    263: ("unlinkat", 1, 0),
    264: ("renameat", 1, 0),
    265: ("linkat", 3, 2),
    266: ("symlinkat", 2, 1),
    268: ("fchmodat", 1, 0),
    285: ("fallocate", None, None),
    296: ("pwritev", None, None),
    316: ("renameat2", 1, 0),
}
AT_FDCWD = -100
NOTIFICATION = struct.Struct("QII iIQ6Q")  # id, thread, flags; number, architecture, instruction, arguments
ANSWER = struct.Struct("QqiI")  # id, value, error, flags
RECEIVE, SEND = 0xC0502100, 0xC0182101  # ioctls of the listener
CONTINUE = 1


class RefusedError(Exception):
    """This machine does not let us hold system calls."""


def watch_system_calls(points, parent):
    """From now on, every listed system call of this process waits for an answer from the parent."""
    load_word, equal, give_back = 0x20, 0x15, 0x06
    calls = list(SYSTEM_CALLS)
    program = [(load_word, 0, 0, 0)]  # the number of the call
    program += [(equal, len(calls) - i, 0, call) for i, call in enumerate(calls)]  # to the last line, or on
    program += [(give_back, 0, 0, 0x7FFF0000), (give_back, 0, 0, 0x7FC00000)]  # allow, notify
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, without which only root may filter
    listener, reason = -1, f"the system calls listed here are those of x86-64, not of {os.uname().machine}"
    if os.uname().machine == "x86_64":
        listener = libc.syscall(317, 1, 8, header)  # seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER
        reason = f"seccomp refuses to notify: {os.strerror(ctypes.get_errno())}"
    socket.send_fds(parent, [reason.encode()], [listener] if listener >= 0 else [])


def await_system_calls(points, messages, victim):
    reason, descriptors, *_ = socket.recv_fds(messages, 1000, 1)
    if not descriptors:
        raise RefusedError(reason.decode())
    with os.fdopen(descriptors[0], "rb", buffering=0) as listener:
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        while poll.poll()[0][1] & select.POLLIN:
            notification = bytearray(NOTIFICATION.size)
            try:
                fcntl.ioctl(listener, RECEIVE, notification)
                identity, _, _, number, _, _, *arguments = NOTIFICATION.unpack(notification)
                if name := fatal_system_call(points, number, arguments, victim):
                    os.kill(victim, signal.SIGKILL)  # while the listener is open: the call waits and is never made
                    return name
                fcntl.ioctl(listener, SEND, ANSWER.pack(identity, 0, 0, CONTINUE))
            except FileNotFoundError:
                continue  # the victim ended meanwhile
            except PermissionError as error:
                raise RefusedError(f"a child's memory and descriptors: {error}") from None
    return ""


def fatal_system_call(points, number, arguments, victim):
    name, path_argument, folder_argument = SYSTEM_CALLS[number]
    if name in ("open", "openat") and not arguments[path_argument + 1] & WRITING:
        return None
    if path_argument is None:
        return points.fatal(name, descriptor_path(arguments[0], victim))
    with Path(f"/proc/{victim}/mem").open("rb", buffering=0) as memory:
        text = os.pread(memory.fileno(), 4096, arguments[path_argument]).split(b"\0")[0]
    path = Path(os.fsdecode(text))
    if folder_argument is not None and (folder := ctypes.c_int(arguments[folder_argument]).value) != AT_FDCWD:
        path = descriptor_path(folder, victim) / path
    return points.fatal(name, path)


# Killing and looking

KINDS = {"python": (watch_python, await_python), "system calls": (watch_system_calls, await_system_calls)}


def kill_one(kind, points, states):
    """Save step 3 in a victim; return the name of the point at which it was killed, or "" when it got through."""
    watch, wait = KINDS[kind]
    ours, theirs = socket.socketpair()
    victim = os.fork()
    if not victim:
        try:
            signal.alarm(VICTIM_SECONDS)
            ours.close()
            watch(points, theirs)
            commit(points.folder, 3, states)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    theirs.close()
    with ours:
        try:
            name = wait(points, ours, victim)
        except BaseException:
            os.kill(victim, signal.SIGKILL)
            raise
        finally:
            status = os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1])
    assert status == (-signal.SIGKILL if name else 0), f"{kind}: a victim at {name or 'no point'} ended with {status}"
    return name


def kill_all(kind, root, worker, states):
    """Kill a victim at each point that is this worker's; return the folders by the points' names."""
    folders = {}
    while True:
        folder = root / f"{kind}-{worker}-{len(folders)}" / "checkpoints"
        shutil.copytree(root / "template", folder, symlinks=True)
        name = kill_one(kind, Points(folder, worker, folders), states)
        if not name:
            return folders
        folders[name] = folder
        assert len(folders) < MAX_POINTS, f"{kind}: are these names new in every save? {list(folders)[-9:]}"


def check(folder, states):
    """Do what a resuming run does and return the steps that were left; raises when anything is not as it should be."""
    assert os.listdir(folder.parent) == ["checkpoints"], os.listdir(folder.parent)
    found = find_checkpoints(folder)
    steps = [checkpoint.global_step for checkpoint in found]
    assert steps in LEGITIMATE, f"steps {steps} are left"
    for checkpoint in found:
        verify(checkpoint)
    for link in ("latest", "best"):
        assert (folder / link).resolve() in [checkpoint.path for checkpoint in found], f"{link} leads nowhere"

    assert select_checkpoint(folder, None) == found[-1], "the newest is not chosen"
    model, optimizer = build(0)
    load(found[-1], model, optimizer)
    assert bits(copy_to_host(model, optimizer)) == bits(states[steps[-1]]), f"other arrays than at step {steps[-1]}"

    added = commit(folder, 4, states)
    verify(added)
    assert sorted(os.listdir(folder)) == [added.path.name, "best", "latest"], os.listdir(folder)
    assert {(folder / link).resolve() for link in ("latest", "best")} == {added.path}
    return steps


def bits(state):
    arrays = {("weights", name): array for name, array in state.weights.items()}
    arrays |= {("optimizer", name): array for name, array in state.optimizer.items()}
    return {name: (str(array.dtype), array.shape, array.tobytes()) for name, array in arrays.items()}


def work(worker, root, states):
    """Kill, then check; return a row for each point."""
    rows, folders = [], {}
    for kind in KINDS:
        try:
            folders[kind] = kill_all(kind, root, worker, states)
        except RefusedError as error:
            rows.append({"kind": kind, "refused": str(error)})
    for kind in folders:  # this starts a jax backend: no forking any more
        for name, folder in folders[kind].items():
            row = {"kind": kind, "point": name}
            try:
                rows.append(row | {"steps": check(folder, states)})
            except Exception as error:
                rows.append(row | {"failure": f"{type(error).__name__}: {error}"})
    return rows


def main():
    root = Path(sys.argv[1]).resolve()
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as pool:
        states = pool.apply(prepare, [root / "template"])
    with context.Pool(WORKERS) as pool:
        rows = pool.starmap(work, [(worker, root, states) for worker in range(WORKERS)])
    print(json.dumps([row for worker_rows in rows for row in worker_rows]))


if __name__ == "__main__":
    main()
