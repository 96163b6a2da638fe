"""Pools: a process that dies takes nothing with it, one that is stopped cleans up, and a cluster finds what one machine does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import ROOT, TINY
from standin import Here, deadly, deadly_once, rule_of, slowly, timed, waiting

from rpac.devices.toolchain import toolchain
from rpac.errors import TargetError
from rpac.files.store import Store
from rpac.spec import load_spec
from rpac.tune import Job, Measure, Outcome, Result, local_processes, on_cluster
from rpac.tune.jobs import run_job
from rpac.tune.search import Climb, search

SPEC = load_spec(ROOT / "specs" / "llama3-8b.yaml")
TINY_SPEC = load_spec(TINY)


@pytest.fixture
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where stand-ins leave marks, in whatever process they run."""
    folder = tmp_path / "marks"
    folder.mkdir()
    monkeypatch.setenv("STANDIN_MARKS", str(folder))
    return folder


def climb() -> Climb:
    return Climb(SPEC, rule_of(SPEC, "decode"), 0)


def here() -> Outcome:
    return search([climb()], Here(), Store(None), evaluate=timed)[0]


def jobs() -> list[Job]:
    pool = Here()
    search([climb()], pool, Store(None), evaluate=timed)
    return pool.ran


def wait_for(count: int, folder: Path) -> None:
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) != count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_processes_find_what_threads_find() -> None:
    with local_processes(2) as pool:
        assert search([climb()], pool, Store(None), evaluate=timed) == [here()]


def test_a_job_whose_process_dies_is_tried_again(marks: Path) -> None:
    with local_processes(2) as pool:
        assert search([climb()], pool, Store(None), evaluate=deadly_once) == [here()]
    assert list(marks.iterdir())


def test_a_job_that_kills_every_process_is_rejected_alone() -> None:
    with local_processes(2) as pool:
        (outcome,) = search([climb()], pool, Store(None), evaluate=deadly)
    assert list(outcome.rejected) == ["rule"]
    assert "every process that tried it died" in outcome.rejected["rule"]
    assert outcome.chosen is not None


def test_an_exception_stops_what_runs_and_lets_it_clean_up(marks: Path) -> None:
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), local_processes(2) as pool:
        futures = [pool.submit(waiting, job) for job in jobs()[:3]]
        wait_for(2, marks)
        raise KeyboardInterrupt
    assert time.monotonic() - start < 60
    assert list(marks.iterdir()) == []
    assert all(future.done() for future in futures)


def test_a_job_is_refused_where_the_toolchain_is_another_one() -> None:
    job = jobs()[0]
    assert isinstance(job, Measure)
    foreign = Measure(
        job.case, job.label, job.task, job.model, job.limits, job.batches, {**toolchain(), "libtpu": "9.9"}
    )
    with pytest.raises(TargetError, match=r"the worker has libtpu 0\..*, the search 9\.9; install the same on both"):
        run_job(foreign)


# ---- a cluster

SCHEDULER = """
import sys
from distributed import LocalCluster
if __name__ == "__main__":
    cluster = LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1")
    print(cluster.scheduler_address, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a scheduler with two worker processes, which a nanny each starts again."""
    folder = tmp_path_factory.mktemp("cluster")
    script = folder / "scheduler.py"
    script.write_text(SCHEDULER)
    path = os.pathsep.join([str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")])
    with (folder / "errors").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
        )
    assert process.stdin is not None
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    assert address, (folder / "errors").read_text()
    yield address
    process.stdin.close()
    process.stdout.close()
    process.wait(60)


def test_a_cluster_finds_what_one_machine_finds_though_a_worker_is_killed_half_way(
    cluster: str, tmp_path: Path
) -> None:
    from distributed import Client

    expected, store = here(), Store(tmp_path)
    with Client(cluster, set_as_default=False) as client:
        before = client.run(os.getpid)
        victim = next(iter(before.values()))
        said: list[str] = []

        def kill(job: Job, result: Result, stored: bool) -> None:
            said.append(job.label)
            if len(said) == len(expected.tried) // 2:
                os.kill(victim, signal.SIGKILL)

        with on_cluster(cluster) as pool:
            assert pool.width() == 2
            outcomes = search([climb()], pool, store, evaluate=slowly, progress=kill)
        deadline = time.monotonic() + 60
        while len(client.run(os.getpid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert victim not in client.run(os.getpid).values()
    assert outcomes == [expected]
    assert len(said) == len(set(said)) + 1 == len(expected.tried) + 1  # each timed once, and the winner's check
    pool_after = Here()
    assert search([climb()], pool_after, store, evaluate=timed) == [expected]
    assert pool_after.ran == []


def test_a_scheduler_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpac.tune.executors.CONNECT_S", 1)
    with (
        pytest.raises(TargetError, match=r"no Dask scheduler answers at 'tcp://127\.0\.0\.1:1'"),
        on_cluster("tcp://127.0.0.1:1"),
    ):
        pass


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(TargetError, match=r"install rpac\[tune\]"), on_cluster("tcp://127.0.0.1:1"):
        pass
