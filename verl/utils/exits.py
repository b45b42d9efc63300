"""How a run ends: signals, one clear message, and exit codes."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)
SECONDS_TO_STOP = 20.0
"""After a signal the run may end in its own way for this long; then it is cut off."""
_SECONDS_TO_EXIT = 5.0
_ADVICE = "advice"
"""Attribute of an error that ends a run: what the same command does next."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Explained:
    """Mixin of exceptions whose text tells a user what to do: it is shown without a traceback."""

    exit_code = 1

    @property
    def user_message(self) -> str:
        """What to show."""
        return str(self)


class UserError(Explained, ValueError):
    """What a user can mend, found while a run works; the message says what to type instead."""


class Interrupted(Explained, KeyboardInterrupt):
    """The run was asked to stop by a signal. Not an `Exception`, so that nothing swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum
        self.exit_code = 128 + signum

    def __str__(self) -> str:
        return f"Stopped by {signal.Signals(self.signum).name}."


def exit_on_error(main: Callable[[], Any], *, resumes: bool = True) -> None:
    """Runs an entry point and exits with what it returns, 0 for None.

    An error becomes one message on stderr and an exit code.

    Exceptions may say `user_message` (shown instead of a traceback) and `exit_code`: 2 is a wrong
    configuration, 130 SIGINT, 143 SIGTERM, 1 everything else. `resumes` adds what `advising` says
    of how the same command goes on.
    """
    try:
        with signals_raise():
            code = main() or 0
    except SystemExit:
        raise
    except BaseException as error:
        # Some errors are not an Exception: a signal, and torch's CheckpointException.
        advice = _advice(error)
        if type(error) is KeyboardInterrupt:
            error = Interrupted(signal.SIGINT)
        error = _unwrapped(error)
        code = getattr(error, "exit_code", 1)
        _report(error, advice if resumes and code != 2 else "")
        _exit_within(_SECONDS_TO_EXIT, code)
    sys.exit(code)


@contextmanager
def advising(advice: Callable[[], str]) -> Iterator[None]:
    """An error that leaves the block carries what the same command does next, as known then."""
    try:
        yield
    except BaseException as error:
        setattr(error, _ADVICE, advice())
        raise


def _advice(error: BaseException | None) -> str:
    """What `advising` noted on an error, or on one that it has taken the place of."""
    while error is not None:
        if advice := getattr(error, _ADVICE, ""):
            return advice
        error = error.__context__
    return ""


def _unwrapped(error: BaseException) -> BaseException:
    """The explained error inside of the one that Ray makes of it, whose text is a traceback."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, Explained) and isinstance(cause, BaseException) else error


def _report(error: BaseException, advice: str) -> None:
    message = getattr(error, "user_message", None)
    if message is None:
        traceback.print_exception(error)
        message = f"{type(error).__name__}: {error}"
    else:
        logger.debug("where the error came from", exc_info=error)
        notes = getattr(error, "__notes__", [])
        message = "\n".join([message, *(note.partition("\n")[0] for note in notes)])
    hint = f"\n{advice}" if advice else ""
    sys.stdout.flush()
    prefix = "" if isinstance(error, KeyboardInterrupt) else "error: "
    sys.stderr.write(f"\n{prefix}{message}{hint}\n")
    sys.stderr.flush()


def _exit_within(seconds: float, code: int) -> None:
    """Bounds what Python does at exit: it would wait for every thread of every pool."""
    timer = threading.Timer(seconds, os._exit, args=(code,))
    timer.daemon = True
    timer.start()


@contextmanager
def signals_raise() -> Iterator[Callable[[], None]]:
    """SIGINT, SIGTERM and SIGHUP raise `Interrupted` in a block; a second one ends the process.

    Yields a function that installs the handlers once more, for libraries that replace them. Does
    nothing outside of the main thread, where Python allows no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {s: signal.getsignal(s) for s in _SIGNALS}
    # nohup and `&` ignore signals on purpose.
    caught = [s for s, handler in before.items() if handler is not signal.SIG_IGN]
    received: list[int] = []

    def handle(signum: int, _frame: FrameType | None) -> None:
        if received:
            os._exit(128 + signum)  # the reaper sees to the rest
        received.append(signum)
        name = signal.Signals(signum).name
        _say(f"\nReceived {name}: stopping the run. Once more stops it at once.\n")
        raise Interrupted(signum)

    def install() -> None:
        for signum in caught:
            signal.signal(signum, handle)

    with _cut_off(set(caught), received):
        install()
        try:
            yield install
        except KeyboardInterrupt:
            # ray.get and ray.wait raise a KeyboardInterrupt of their own instead of ours.
            if received:
                raise Interrupted(received[0]) from None
            raise
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler or signal.SIG_DFL)


@contextmanager
def _cut_off(signums: set[int], received: list[int]) -> Iterator[None]:
    """Ends the process `SECONDS_TO_STOP` after a signal, if the block has not ended by then.

    Python runs handlers between two instructions of the main thread, which may be deep inside of a
    library. The interpreter itself notes a signal at once in the wake-up descriptor.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    ended = threading.Event()

    def watch() -> None:
        while data := reader.recv(64):
            if signums & set(data):
                break
        else:
            return
        if not ended.wait(SECONDS_TO_STOP):
            _say(f"The run did not stop within {SECONDS_TO_STOP:.0f} s and is cut off.\n")
            os._exit(128 + (received or [next(s for s in data if s in signums)])[0])

    old = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=watch, name="cut-off", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(old)
        ended.set()
        writer.close()


def _say(text: str) -> None:
    """Writes to stderr from a signal handler, where a buffered stream may be in use already."""
    with suppress(OSError):  # the terminal may be gone
        os.write(2, text.encode())
