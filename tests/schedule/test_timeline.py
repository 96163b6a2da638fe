"""What the compiler starts early and awaits late takes no time of its own where the core has other work meanwhile."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rpac.schedule import Call, Model, model_of, parse_schedule, walk
from rpac.schedule.timeline import Timeline

from .gather import PAGES, SEQS
from .test_fixtures import LENS, TABLE, load

MIB = 2**20


@pytest.fixture
def model() -> Model:
    return replace(model_of("tpu7x"), hbm_bytes_per_s=1e6 * MIB, latency_s=1e-6, setup_s=0.0)  # a MiB in a us


def test_a_copy_is_hidden_behind_work_and_its_rest_is_waited_for(model: Model) -> None:
    timeline = Timeline(model)
    timeline.start_copy("hidden", 2 * MIB)
    timeline.pass_by(5e-6)
    assert timeline.wait("hidden") == 0
    timeline.start_copy("exposed", 10 * MIB)
    timeline.pass_by(4e-6)
    assert timeline.wait("exposed") == pytest.approx(7e-6)  # 10 us and the latency, less 4
    assert timeline.now == pytest.approx(16e-6)


def test_copies_share_the_channel_and_leave_a_backlog(model: Model) -> None:
    timeline = Timeline(model)
    timeline.start_copy("one", 3 * MIB)
    timeline.start_copy("two", 3 * MIB)
    assert timeline.backlog == round(6e-6 * model.clock_hz)
    assert timeline.wait("two") == pytest.approx(7e-6)
    assert timeline.backlog == 0


def test_collectives_queue_on_the_interconnect_and_not_on_the_channel(model: Model) -> None:
    timeline = Timeline(model)
    timeline.start_copy("copy", 8 * MIB)
    timeline.start_collective("first", 3e-6)
    timeline.start_collective("second", 3e-6)
    assert timeline.wait("first") == pytest.approx(3e-6)
    assert timeline.wait("second") == pytest.approx(3e-6)


def test_what_was_started_in_an_earlier_iteration_is_the_oldest(model: Model) -> None:
    timeline = Timeline(model)
    timeline.start_copy("started", 4 * MIB)
    assert timeline.wait("renamed") == pytest.approx(5e-6)
    assert timeline.wait("nothing") == 0


def test_a_kernel_waits_for_the_transfers_that_were_started_before_it(model: Model) -> None:
    call = Call(load("tpu7x"), model)
    name = call.kernels[0].name
    schedule = parse_schedule(call.dump.schedules[name], "tpu7x", name)
    operands = call.operands({LENS: [1] * SEQS, TABLE: list(range(PAGES))})[name]
    alone = walk(schedule, operands, model)
    timeline = Timeline(model)
    timeline.start_copy("weights", 100 * MIB)
    behind = timeline.walk(lambda backlog: walk(schedule, operands, model, backlog=float(backlog)))
    assert behind.transfers == alone.transfers
    assert behind.read_bytes == alone.read_bytes
    assert behind.issued == alone.issued
    late = (behind.cycles - alone.cycles) / model.clock_hz
    assert 90e-6 < late <= 100e-6  # of the copy's 100 us a part passes before the kernel's first transfer
    assert timeline.now == pytest.approx(behind.cycles / model.clock_hz)
    assert timeline.backlog == 0
