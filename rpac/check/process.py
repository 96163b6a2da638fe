"""A process of its own for code that nobody trusts: what it may see and use, and how it ended.

It has a session and an empty folder of its own, no open file of the caller, none of the caller's environment but what JAX and
Python need, and limits on time and memory. It runs as the same user on the same machine: a process that does more than
crash is only held by what holds that user.
"""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from rpac.errors import TargetError

KEPT: Final = frozenset({
    "PATH", "LANG", "LANGUAGE", "TZ", "PYTHONPATH", "PYTHONHOME", "PYTHONHASHSEED", "VIRTUAL_ENV", "LD_LIBRARY_PATH",
    "ALLOW_MULTIPLE_LIBTPU_LOAD", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES",
})  # fmt: skip
KEPT_PREFIXES: Final = ("LC_", "JAX_", "XLA_", "TPU_", "CLOUD_TPU_", "LIBTPU_", "MEGASCALE_", "PJRT_")
DROPPED: Final = frozenset({"JAX_COMPILATION_CACHE_DIR"})  # what is written there runs in other processes later

DEFAULT_SECONDS: Final = 1800.0
_FILE_BYTES: Final = 64 << 20
_REPORT_BYTES: Final = 8 << 20
_WORDS_BYTES: Final = 4 << 10  # of what it wrote to stderr, the last ones
_POLL_S: Final = 0.2


@dataclass(frozen=True)
class ProcessLimits:
    """`seconds` until it is ended, and bytes of memory that it may occupy: by default 3/4 of the machine's.

    The caller looks several times a second at what the process occupies, because a runtime that is refused memory may hang. What
    it may allocate is limited as well, to twice as much, so that it cannot outrun the look.
    """

    seconds: float = DEFAULT_SECONDS
    memory_bytes: int = 0

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise TargetError(f"found a limit of {self.seconds} s; must be above 0 seconds")
        if self.memory_bytes < 0:
            raise TargetError(
                f"found a limit of {self.memory_bytes} bytes; must be above 0, or 0 for 3/4 of the machine's"
            )

    @property
    def memory(self) -> int:
        """Bytes."""
        return self.memory_bytes or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4


@dataclass(frozen=True)
class Ended:
    """How a process ended: `how` is empty where it ended by itself with 0. `words`: the last that it wrote to stderr."""

    how: str
    words: str


def environment(scratch: Path, more: Mapping[str, str]) -> dict[str, str]:
    """What such a process has: of this one's environment what JAX and Python need, `scratch` as its home, and `more`."""
    kept = {name: value for name, value in os.environ.items() if name in KEPT or name.startswith(KEPT_PREFIXES)}
    homes = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), str(scratch))
    kept["PYTHONPATH"] = os.pathsep.join(_python_path())
    return {name: value for name, value in {**kept, **homes, **more}.items() if name not in DROPPED}


def _python_path() -> list[str]:
    """Where Python looks first, from any folder; and where this rpac is, which may be a checkout that is the current folder."""
    given = [str(Path(one).absolute()) for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one]
    own = str(Path(__file__).parents[2])
    return given if own in given or own.startswith(sys.prefix) else [*given, own]


def run_apart(
    module: str,
    request: bytes,
    scratch: Path,
    limits: ProcessLimits,
    line: Callable[[bytes], None],
    more: Mapping[str, str] | None = None,
) -> Ended:
    """Runs a Python module in such a process, whose folder is `scratch`, and ends all of its session afterwards.

    The module finds `request`, one line, on its stdin. It writes its own lines to the descriptor that is its only argument, and
    `line` is called with each. It must call `confine` before it does anything that is not trusted.
    """
    reading, writing = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, reading)
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(writing)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(writing,),
                cwd=scratch,
                env=environment(scratch, more or {}),
                start_new_session=True,
            )
        finally:
            os.close(writing)
        assert process.stdin is not None and process.stderr is not None
        stack.callback(_finish, process)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(request + b"\n")
            process.stdin.flush()  # and left open: the process ends when its caller does
        reader = _Reader(reading, process.stderr, line)
        why = reader.read(process.pid, time.monotonic() + limits.seconds, limits)
        _end(process.pid)
        process.wait()
        reader.rest()
    return Ended(f"was ended {why}" if why else _how(process.returncode), reader.words)


def confine(limits: ProcessLimits) -> None:
    """Sets the limits of this process, for good; ends it when nobody holds the other end of its stdin any more."""
    cpu = min(int(limits.seconds * (os.cpu_count() or 1)) + 1, 2**31)  # also of children that left the session
    for name, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_DATA, 2 * limits.memory),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_CPU, cpu),
    ):
        _, hard = resource.getrlimit(name)
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(name, (least, least))
    threading.Thread(target=_end_with_caller, daemon=True).start()


def _end_with_caller() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    os._exit(1)


class _Reader:
    """What the process writes, of which nothing is trusted: not its length, not that it ends."""

    def __init__(self, report: int, errors: IO[bytes], line: Callable[[bytes], None]) -> None:
        self._report, self._errors = report, errors.fileno()
        self._line = line
        self._begun = b""
        self._words = b""
        self._count = 0
        for one in (self._report, self._errors):
            os.set_blocking(one, False)

    @property
    def words(self) -> str:
        return self._words.decode("utf-8", "replace").strip()

    def read(self, pid: int, deadline: float, limits: ProcessLimits) -> str:
        """Reads until the process ends; returns why it must be ended, empty where it ended by itself."""
        with selectors.DefaultSelector() as selector:
            for one in (self._report, self._errors):
                selector.register(one, selectors.EVENT_READ)
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    return f"after {limits.seconds:g} s, the limit on its time"
                if _occupied(pid) > limits.memory:
                    return f"at {limits.memory / 2**30:.2g} GiB, the limit on its memory"
                for key, _ in selector.select(min(left, _POLL_S)) if selector.get_map() else ():
                    if not self._take(key.fd):
                        selector.unregister(key.fd)
                if self._count > _REPORT_BYTES:
                    return f"because it wrote over {_REPORT_BYTES >> 20} MiB of report"
                # Not reaped: its number stays its own until all of its session is ended.
                if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                    return ""
                if not selector.get_map():
                    time.sleep(min(left, _POLL_S / 10))

    def rest(self) -> None:
        """Takes what lies in the pipes, and waits for nothing: a process that left the session may hold their other ends."""
        for one in (self._report, self._errors):
            while self._count <= _REPORT_BYTES and self._take(one):
                pass

    def _take(self, one: int) -> bool:
        """Whether there was something."""
        try:
            data = os.read(one, 1 << 16)
        except BlockingIOError:
            return False
        self._count += len(data)
        if one == self._errors:
            self._words = (self._words + data)[-_WORDS_BYTES:]
            return bool(data)
        *lines, self._begun = (self._begun + data).split(b"\n")
        for line in lines:
            self._line(line)
        return bool(data)


def _occupied(pid: int) -> int:
    """Bytes of memory that a process occupies; 0 on a system that does not say."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _end(pid: int) -> None:
    """Ends all of a session whose first process is not reaped yet."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _finish(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is None:
        _end(process.pid)
        process.wait()
    for stream in (process.stdin, process.stderr):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def _how(code: int) -> str:
    if code >= 0:
        return "" if code == 0 else f"ended with exit code {code}"
    names: Sequence[str] = [one.name for one in signal.Signals if one == -code]
    return f"was killed by {names[0] if names else f'signal {-code}'}"
