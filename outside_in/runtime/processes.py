"""Multi-process coordination: how processes of one run meet and agree.

They are JAX's (https://docs.jax.dev/en/latest/multi_process.html): each runs the same program on its own devices. Only
the first, the main process, writes files and prints.
"""

import contextlib
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from outside_in.runtime.log import log

OTHER_ERROR = -1
START_SECONDS = 60  # within which all processes must have come
SILENT_SECONDS = 30  # after which a process that is not heard of counts as dead


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Meet the other processes of the run, before JAX starts its devices.

    Without arguments they are found by torchrun's variables, or by JAX itself under SLURM, Open MPI and Kubernetes. All
    but the main process log nothing from now on.
    Raises ValueError when they cannot be found, or do not come in time.
    """
    options: dict[str, Any] = {}
    if coordinator is not None:
        options = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
    elif torchrun := _torchrun(os.environ):
        options = torchrun
    where = options.get("coordinator_address", "an address that the environment names")
    remedy = "start all of them, and check --coordinator HOST:PORT, --processes and --process"
    problem = f"--distributed: the processes did not meet at {where} within {START_SECONDS} s"

    def give_up() -> None:  # before JAX does, which would end this process with a trace of C++
        print(f"error: {problem}; {remedy}", file=sys.stderr, flush=True)
        os._exit(2)  # the user can fix it

    timer = threading.Timer(START_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=2 * START_SECONDS,
            heartbeat_timeout_seconds=SILENT_SECONDS,
            shutdown_timeout_seconds=SILENT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        message = " ".join(str(error).split())[:300]
        raise ValueError(f"{problem} ({message}); {remedy}") from None
    finally:
        timer.cancel()
    if not is_main_process():
        log.setLevel(logging.CRITICAL)


def _torchrun(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return JAX's options from torchrun's variables, if they are set.

    torchrun's store listens at MASTER_PORT, so JAX gets the next port.
    """
    names = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK")
    if not all(name in environment for name in names):
        return {}
    address, port, processes, process, local = (environment[name] for name in names)
    if not all(value.isdecimal() for value in (port, processes, process, local)):
        raise ValueError(f"--distributed: expected numbers in {', '.join(names[1:])}, as torchrun sets them")
    return {
        "coordinator_address": f"{address}:{int(port) + 1}",
        "num_processes": int(processes),
        "process_id": int(process),
        "local_device_ids": [int(local)],
    }


def is_main_process() -> bool:
    return not is_distributed() or jax.process_index() == 0


def is_distributed() -> bool:
    """Return whether others have joined. A process on its own does not start JAX's devices for the answer."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


@contextlib.contextmanager
def propagate_errors() -> Iterator[None]:
    """Raise an error in all processes when the block fails in one.

    Else the others would wait forever. An OSError has the same errno everywhere, so that all handle it in the same way.
    The block itself must not wait for other processes.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if is_distributed():
        code = failure.errno or OTHER_ERROR if isinstance(failure, OSError) else OTHER_ERROR
        codes = multihost_utils.process_allgather(np.array(code if failure is not None else 0))
        if failure is None and codes.any():
            first = int(np.flatnonzero(codes)[0])
            who = f"process {first} of {jax.process_count()} failed"
            if codes[first] != OTHER_ERROR:
                raise OSError(int(codes[first]), f"{who}: {os.strerror(int(codes[first]))}")
            raise RuntimeError(f"{who}; its output says why")
    if failure is not None:
        raise failure


def all_max(value: int) -> int:
    """Return the largest value that any process has."""
    return start_all_max(value)()


def start_all_max(value: int) -> Callable[[], int]:
    """Start to find the largest value that any process has. Returns a function that waits for it."""
    if not is_distributed():
        return lambda: value
    sharding = NamedSharding(Mesh(np.array(jax.devices()), "device"), PartitionSpec("device"))
    values = np.full(jax.local_device_count(), value, np.uint32)
    maximum = _max(jax.make_array_from_process_local_data(sharding, values))
    return lambda: int(maximum.addressable_data(0))


@jax.jit
def _max(values: jax.Array) -> jax.Array:
    return values.max()


def device_put_global(array: Any, sharding: Any) -> jax.Array:
    """Put an array on the devices.

    Each process brings the parts of its devices, of an array that it has whole or that is on all devices already.
    """
    if not is_distributed() or sharding is None:
        return jax.device_put(array, sharding)
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return jax.jit(lambda x: x, out_shardings=sharding)(array)
    on_host = np.asarray(array)
    return jax.make_array_from_callback(on_host.shape, sharding, on_host.__getitem__)


def on_main_process(function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Call a function in the main process. If it fails, all processes fail."""
    with propagate_errors():
        if is_main_process():
            function(*arguments, **options)


@contextlib.contextmanager
def held_by_main_process(context: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    """Enter a context in the main process. If that fails, all processes fail."""
    with contextlib.ExitStack() as stack:
        on_main_process(stack.enter_context, context)
        yield


def broadcast(value: Any) -> Any:
    """Return the main process's value, which JSON can hold, in all processes."""
    if not is_distributed():
        return value
    content = json.dumps(value).encode() if is_main_process() else b""
    length = int(multihost_utils.broadcast_one_to_all(np.array(len(content), np.int32)))
    padded = np.frombuffer(content.ljust(length), np.uint8) if is_main_process() else np.zeros(length, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes())


def check_same(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError when this process's configs differ from the main process's.

    `configs` are by file; the message names the first key that differs.
    """
    for file, expected in broadcast({file: dict(config) for file, config in configs.items()}).items():
        local = json.loads(json.dumps(dict(configs[file])))
        for key in sorted(local.keys() | expected.keys()):
            if local.get(key) != expected.get(key):
                raise ValueError(
                    f"{file}: {key} is {json.dumps(local.get(key))} in process {jax.process_index()}, but "
                    f"{json.dumps(expected.get(key))} in process 0; all need the same files and arguments"
                )


def gather_to_host(arrays: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Copy arrays, also those sharded over processes, to every host."""
    spread = {name for name, x in arrays.items() if not (x.is_fully_addressable or x.is_fully_replicated)}
    whole = jax.device_get({name: array for name, array in arrays.items() if name not in spread})
    gathered = {name: multihost_utils.process_allgather(arrays[name], tiled=True) for name in sorted(spread)}
    return {name: np.asarray(whole[name] if name in whole else gathered[name]) for name in arrays}
