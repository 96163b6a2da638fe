"""A bundle that ends its process, hangs, takes all memory or writes nonsense: the caller goes on, and says what happened."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command import rpac as command
from command import start
from forged import TRAPS, calling, endless, trapping, zeroing

import rpac
from rpac.bundle import describe, write_bundle
from rpac.bundle.manifest import _seal
from rpac.check import isolated, process
from rpac.check.isolated import isolated_serve_check
from rpac.check.process import Ended, ProcessLimits, run_apart
from rpac.contract.program import Variant
from rpac.errors import BundleError, TargetError
from rpac.files.store import Store
from rpac.oracle.expected import canary_answers
from rpac.spec import Spec

LIMITS = ProcessLimits(seconds=120)

forging = pytest.mark.skipif(platform.machine() not in TRAPS, reason="no instructions for this machine are known here")


def bundle_of(folder: Path, spec: Spec, one: Any, **changes: Any) -> Path:
    """A bundle of one program, changed, whose manifest and canary are those of a build."""
    forged = dataclasses.replace(one, **changes)
    answers = canary_answers(spec, [Variant(one.kind, one.tokens)], Store(None))
    write_bundle(folder / "tiny.rpac", spec, [forged], canaries=answers)
    return folder / "tiny.rpac"


@forging
def test_a_forged_executable_ends_its_process_and_not_the_caller(
    tmp_path: Path, tiny: Spec, native_programs: list[Any]
) -> None:
    """Its machine code is another's, and the manifest is made anew: every hash is right, and so is every version."""
    first = native_programs[0]
    path = bundle_of(tmp_path, tiny, first, executable=trapping(first.executable))
    report = isolated_serve_check(path, "cpu", seed=1, limits=LIMITS)
    assert [step.name for step in report.steps if step.ok] == ["verify", "load", "warm"]
    failed = report.steps[-1]
    assert failed.name == "canary decode/8"
    assert failed.detail.startswith(
        "the process that ran it was killed by SIGTRAP; must end by itself, within 120 s and "
    )
    assert report.exit_code == 1


@forging
def test_a_digest_refuses_a_forged_executable_before_it_is_read(
    tmp_path: Path, tiny: Spec, native_programs: list[Any]
) -> None:
    sound = bundle_of(tmp_path / "sound", tiny, native_programs[0])
    known = describe(sound)["digest"]
    forged = trapping(native_programs[0].executable)
    path = bundle_of(tmp_path, tiny, native_programs[0], executable=forged)
    with pytest.raises(BundleError, match=f"its digest is .*; must be {known}"):
        rpac.load(path, target="cpu", expect_digest=known)


def test_an_export_that_calls_a_function_of_the_process_never_compiles(
    tmp_path: Path, tiny: Spec, programs: list[Any]
) -> None:
    path = bundle_of(tmp_path, tiny, programs[0], exported=calling(programs[0].exported))
    done = command("serve-check", path, "--target", "cpu", cache=tmp_path)
    assert done.returncode == 4, done.stdout + done.stderr
    assert "warm: program decode/8: its export calls lapack_" in done.stdout


def test_a_program_that_is_wrong_for_one_length_passes_a_canary_and_only_trust_refuses_it(
    small: Path, tmp_path: Path
) -> None:
    """No number of batches shows that a program is right for all of them; a digest or a signature shows who made it."""
    known = describe(small)["digest"]
    forged = rebuilt(small, tmp_path / "small.rpac", lambda data: zeroing(data, length=29))
    engine = rpac.load(forged, target="cpu")
    engine.warm(canary=True)
    engine.warm([Variant("decode", 8)], canary=True)
    with pytest.raises(BundleError, match="as expect_digest says"):
        rpac.load(forged, target="cpu", expect_digest=known)


def rebuilt(sound: Path, to: Path, change: Any) -> Path:
    """A bundle whose exports are changed, and whose manifest is made anew: all that is in it matches."""
    manifest = json.loads((sound / "manifest.json").read_text())
    del manifest["digest"]
    (to / "blobs").mkdir(parents=True)
    for path in sound.rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            (to / path.relative_to(sound)).parent.mkdir(parents=True, exist_ok=True)
            (to / path.relative_to(sound)).write_bytes(path.read_bytes())
    for program in manifest["targets"]["cpu"]["programs"]:
        old = to / "blobs" / program["exported"]["sha256"]
        data = change(old.read_bytes())
        old.unlink(missing_ok=True)
        program["exported"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        (to / "blobs" / program["exported"]["sha256"]).write_bytes(data)
    (to / "manifest.json").write_bytes(_seal(manifest))
    return to


def test_an_export_that_never_returns_is_ended(tmp_path: Path, tiny: Spec, programs: list[Any]) -> None:
    path = bundle_of(tmp_path, tiny, programs[0], exported=endless(programs[0].exported))
    done = command("serve-check", path, "--target", "cpu", "--timeout", 6, "--json", cache=tmp_path)
    assert done.returncode == 1, done.stderr
    failed = json.loads(done.stdout)["steps"][-1]
    assert "was ended after 6 s, the limit on its time" in failed["detail"]
    assert failed["name"] in ("start", "load", "warm", "canary decode/8")  # where a slow machine was after 6 s


def test_memory_is_limited(small: Path, tmp_path: Path) -> None:
    done = command("serve-check", small, "--target", "cpu", "--memory", 0.25, cache=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the process that ran it was ended at 0.25 GiB, the limit on its memory" in done.stdout


def test_the_process_ends_with_its_caller(tmp_path: Path, tiny: Spec, programs: list[Any]) -> None:
    path = bundle_of(tmp_path, tiny, programs[0], exported=endless(programs[0].exported))
    running = start("serve-check", path, "--target", "cpu", cache=tmp_path)
    assert running.stderr is not None
    while "warm: ok" not in (line := running.stderr.readline()):
        assert line, "it ended before its programs were ready"
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    assert children
    running.kill()
    running.communicate()
    deadline = time.monotonic() + 10
    while any(_runs(child) for child in children):
        assert time.monotonic() < deadline, "the process of the bundle still runs"
        time.sleep(0.05)


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


PROBE = """
import json, os, resource, sys
from rpac.check.process import ProcessLimits, confine
request = json.loads(sys.stdin.buffer.readline())
confine(ProcessLimits(**request))
limits = {name: resource.getrlimit(getattr(resource, name)) for name in ("RLIMIT_CORE", "RLIMIT_DATA", "RLIMIT_CPU")}
links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]
said = {"env": dict(os.environ), "cwd": os.getcwd(), "limits": limits, "leader": os.getsid(0) == os.getpid(), "open": links}
os.write(int(sys.argv[1]), json.dumps(said).encode() + b"\\n")
"""


@pytest.fixture
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`apart(code)` runs a module of this text in a process of its own; returns how it ended, and its lines."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "scratch").mkdir()
    paths = [str(tmp_path / "modules"), str(Path(rpac.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))

    def run(code: str, limits: ProcessLimits = LIMITS) -> tuple[Ended, list[bytes]]:
        (tmp_path / "modules" / "probe.py").write_text(code)
        lines: list[bytes] = []
        request = json.dumps({"seconds": limits.seconds, "memory_bytes": limits.memory}).encode()
        return run_apart("probe", request, tmp_path / "scratch", limits, lines.append), lines

    return run


def test_it_sees_no_secret_no_open_file_and_a_folder_of_its_own(
    apart: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUD_SECRET", "s3cret")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/var/cache/jax")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with (tmp_path / "open.txt").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        ended, (line,) = apart(PROBE, ProcessLimits(30, 1 << 30))
    assert ended == Ended("", "")
    said = json.loads(line)
    assert "s3cret" not in said["env"].values()
    assert "JAX_COMPILATION_CACHE_DIR" not in said["env"]
    assert said["env"]["JAX_PLATFORMS"] == "cpu"
    assert said["env"]["HOME"] == said["cwd"] == str(tmp_path / "scratch")
    assert said["leader"]
    assert said["limits"]["RLIMIT_CORE"] == [0, 0]
    assert said["limits"]["RLIMIT_DATA"] == [2 << 30, 2 << 30]
    assert said["limits"]["RLIMIT_CPU"][0] <= 30 * (os.cpu_count() or 1) + 1
    assert not [link for link in said["open"] if "open.txt" in link]


def test_it_finds_the_rpac_of_its_caller_from_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "relative")
    found = process.environment(tmp_path / "scratch", {})["PYTHONPATH"].split(os.pathsep)
    own = str(Path(rpac.__file__).parents[1])
    assert found == [str(tmp_path / "relative")] + [own] * (not own.startswith(sys.prefix))


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "was killed by SIGSEGV"),
        ("raise SystemExit(3)", "ended with exit code 3"),
        (
            "import sys, os\nwhile True: os.write(int(sys.argv[1]), b'x' * 65536)",
            "was ended because it wrote over 8 MiB",
        ),
        ("import os\nwhile True: os.write(2, b'x' * 65536)", "was ended because it wrote over 8 MiB"),
    ],
)
def test_how_a_process_ended_is_said(apart: Any, code: str, how: str) -> None:
    ended, lines = apart(code)
    assert ended.how.startswith(how)
    assert lines == []


def test_children_that_it_leaves_behind_are_ended_and_not_waited_for(apart: Any) -> None:
    code = """
import os, sys, time
if os.fork() == 0:
    time.sleep(600)
os.write(int(sys.argv[1]), b"%d\\n" % os.getpid())
"""
    begun = time.monotonic()
    ended, (pid,) = apart(code)
    assert ended.how == ""
    assert time.monotonic() - begun < 10
    with pytest.raises(ProcessLookupError):
        for _ in range(50):
            os.killpg(int(pid), 0)
            time.sleep(0.1)


def test_memory_that_it_takes_faster_than_anybody_looks_is_refused(apart: Any) -> None:
    code = """
import json, os, sys
from rpac.check.process import ProcessLimits, confine
confine(ProcessLimits(**json.loads(sys.stdin.buffer.readline())))
try:
    bytearray(8 << 30)
except MemoryError:
    os.write(int(sys.argv[1]), b"refused\\n")
"""
    assert apart(code, ProcessLimits(30, 1 << 30)) == (Ended("", ""), [b"refused"])


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense",
        b"[1]",
        b'"text"',
        b"{}",
        b'{"start": 7}',
        b'{"name": "warm", "ok": true, "detail": "", "seconds": "nan", "exit_code": 0}',
        b'{"name": "warm", "ok": true, "detail": "", "seconds": 1, "exit_code": 99}',
        b'{"name": "warm", "ok": true, "detail": "", "seconds": 1, "exit_code": "0"}',
        b'{"name": "warm", "ok": true, "detail": ["x"], "seconds": 1, "exit_code": 0}',
        b"[" * 100_000,
    ],
)
def test_a_line_that_is_no_report_ends_the_report(small: Path, monkeypatch: pytest.MonkeyPatch, line: bytes) -> None:
    def forged(module: str, request: bytes, scratch: Path, limits: ProcessLimits, say: Any, more: Any) -> Ended:
        say(b'{"start": "warm"}')
        say(line)
        say(b'{"done": true}')
        return Ended("", "")

    monkeypatch.setattr(isolated, "run_apart", forged)
    report = isolated_serve_check(small, "cpu", seed=1)
    assert [step.ok for step in report.steps] == [True, False]
    assert report.steps[-1].name == "warm"
    assert "ended without the end of its report after a line that is no report" in report.steps[-1].detail
    assert report.exit_code == 1


def test_what_it_writes_cannot_steer_a_terminal(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forged(module: str, request: bytes, scratch: Path, limits: ProcessLimits, say: Any, more: Any) -> Ended:
        step = {"name": "w\x1b[2J", "ok": True, "detail": "\x1b]0;x\x07\nnext", "seconds": 0.5, "exit_code": 0}
        say(json.dumps(step).encode())
        return Ended("was killed by SIGKILL", "last\x1b[31m")

    monkeypatch.setattr(isolated, "run_apart", forged)
    report = isolated_serve_check(small, "cpu", seed=1)
    assert (report.steps[1].name, report.steps[1].detail) == ("w?[2J", "?]0;x?\nnext")
    assert report.steps[2].detail.endswith("its last words: last [31m")


def test_a_policy_is_held_before_any_process_is_started(small: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(isolated, "run_apart", lambda *args: pytest.fail("a process was started"))
    (tmp_path / "policy.yaml").write_text("keys: {}\n")
    report = isolated_serve_check(small, "cpu", seed=1, trust=tmp_path / "policy.yaml")
    assert [(step.name, step.ok) for step in report.steps] == [("verify", False)]
    assert report.exit_code in (2, 4)


@pytest.mark.parametrize("wrong", [{"seconds": 0}, {"seconds": float("nan")}, {"memory_bytes": -1}])
def test_limits_that_are_none_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(TargetError, match="found a limit of"):
        ProcessLimits(**wrong)  # type: ignore[arg-type]
