"""Ctrl-C, SIGTERM and SIGHUP: the first stops soon, a later one at once.

SIGUSR1 asks for a checkpoint.

A Python signal handler waits for the main thread, which may be inside XLA for minutes. So a second thread listens,
through the file descriptor that Python's C handler writes to.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
REPEAT_SECONDS = 1.0  # `uv run` passes a signal on that its whole process group gets: the same one comes twice


class StopRequest:
    """Which stop, and which checkpoint, the user has asked for.

    True when a stop is asked for. When `is_distributed`, only what all processes have agreed upon counts.
    """

    def __init__(self) -> None:
        self.is_distributed = False
        self.received_signal: int | None = None
        self._agreed_signal: int | None = None
        self._wants_save = threading.Event()
        self._agreed_save = threading.Event()

    def pending_signal(self) -> int:
        """Return the signal that this process proposes to all, or 0."""
        if signum := self.pending_stop():
            return signum
        if self.is_distributed and self._wants_save.is_set():
            self._wants_save.clear()
            return signal.SIGUSR1
        return 0

    def pending_stop(self) -> int:
        """Return the same, without requests for checkpoints."""
        return self.received_signal or 0 if self.is_distributed else 0

    def apply(self, agreed: int) -> None:
        """Act upon the signal that all processes agreed upon; 0 is none."""
        if agreed in STOPPING:
            self._agreed_signal = agreed
        elif agreed:
            self._agreed_save.set()

    def ask_to_save(self) -> None:
        self._wants_save.set()

    def take_save_request(self) -> bool:
        """Return whether a checkpoint was asked for since the last call."""
        event = self._agreed_save if self.is_distributed else self._wants_save
        if wanted := event.is_set():
            event.clear()
        return wanted

    def __bool__(self) -> bool:
        return (self._agreed_signal if self.is_distributed else self.received_signal) is not None

    @property
    def exit_code(self) -> int:
        """Return 128 + the signal: 130 after Ctrl-C, 143 after SIGTERM."""
        signum = self._agreed_signal or self.received_signal
        assert signum is not None
        return 128 + signum


@contextlib.contextmanager
def listening(request: StopRequest, first_message: str, second_message: str) -> Iterator[None]:
    """Record signals in `request` while the block runs. Only the main thread may enter it."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def announce(message: str) -> None:
        with contextlib.suppress(OSError):  # the reader of our messages may have left with the same Ctrl-C
            print(f"\n{message}", file=sys.stderr, flush=True)

    def listen() -> None:
        asked_at = 0.0
        while received := reader.recv(1):
            if received[0] == signal.SIGUSR1:
                request.ask_to_save()
            if received[0] not in STOPPING:
                continue
            if request.received_signal is not None:
                is_repeated = received[0] == request.received_signal and time.monotonic() - asked_at < REPEAT_SECONDS
                if is_repeated or received[0] == signal.SIGHUP:  # nobody who closes a terminal asks for more
                    continue
                announce(second_message)
                os._exit(request.exit_code)
            request.received_signal, asked_at = received[0], time.monotonic()
            announce(first_message)

    previous_descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)  # first: none is missed
    handled = [*STOPPING, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup
        handled.remove(signal.SIGHUP)
    previous = {signum: signal.signal(signum, lambda *_: None) for signum in handled}
    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_descriptor)
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        writer.close()  # ends the thread
        thread.join()
        reader.close()


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Raise KeyboardInterrupt for Ctrl-C, SystemExit for SIGTERM and SIGHUP.

    So the block can clean up. A signal that comes twice at once counts once.
    """
    came_at: dict[int, float] = dict.fromkeys(STOPPING, -REPEAT_SECONDS)

    def handle(signum: int, _: object) -> None:
        before, came_at[signum] = came_at[signum], time.monotonic()
        if came_at[signum] - before >= REPEAT_SECONDS:
            raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(128 + signum)

    handled = [signum for signum in STOPPING if signal.getsignal(signum) != signal.SIG_IGN]  # as under nohup
    previous = {signum: signal.signal(signum, handle) for signum in handled}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
