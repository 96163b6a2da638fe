"""Ends the process as a shell expects where its output goes nowhere, or where it is interrupted."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO

from rpac.errors import OutputError

INTERRUPTED = 130  # 128 and the signal's number, as a shell has it
NO_READER = 141


class _Failed(Exception):
    """A standard stream cannot be written; `__cause__` says why. No OSError, because click has its own end for these."""


class _Guarded:
    """A text stream whose failures are told from those of other files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> Any:
        return _guarded(lambda: self._stream.write(text))

    def flush(self) -> None:
        _guarded(self._stream.flush)


def _guarded(write: Callable[[], Any]) -> Any:
    try:
        return write()
    except OSError as error:
        raise _Failed from error


@contextlib.contextmanager
def checked_streams() -> Iterator[None]:
    """Ends the process with `NO_READER` in silence where whoever read its output went away, and with the exit code of an
    OutputError and a line on stderr where stdout cannot be written, such as on a full device.
    """
    out, err = sys.stdout, sys.stderr
    try:
        with contextlib.redirect_stdout(_Guarded(out)), contextlib.redirect_stderr(_Guarded(err)):
            try:
                yield
            finally:
                sys.stdout.flush()
    except _Failed as failed:
        _end(failed.__cause__, out, err)


def _end(error: BaseException | None, out: TextIO, err: TextIO) -> NoReturn:
    assert isinstance(error, OSError)
    _drop(out)  # what is left in its buffer would fail again when Python ends
    if error.errno == errno.EPIPE:
        _drop(err)
        sys.exit(NO_READER)
    with contextlib.suppress(OSError):
        print(f"rpac: OutputError: stdout: cannot be written ({error.strerror}); free some space", file=err, flush=True)
        sys.exit(OutputError.exit_code)
    _drop(err)
    sys.exit(OutputError.exit_code)


def _drop(stream: TextIO) -> None:
    """Sends what is yet written to a stream of this process nowhere."""
    with contextlib.suppress(OSError, ValueError):  # a stream that a test put there has no descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
