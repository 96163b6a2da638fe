"""Device time from traces of JAX's profiler.

`cpu.xplane.pb` was recorded on a CPU. `tpu.xplane.txt` was written by hand, with the names that XLA's profiler gives the
planes, lines and events of a TPU, because no TPU was available to record one.
"""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from rpac.bench.profile import DeviceTimes, NoDeviceTime, device_times, profiled

HERE = Path(__file__).parent


def trace(*changes: tuple[str, str]) -> ProfileData:
    text = (HERE / "tpu.xplane.txt").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return ProfileData.from_text_proto(text)


def test_calls_and_operations_are_read_from_the_lines_of_the_device() -> None:
    found = device_times(trace(), 3)
    assert found.calls == pytest.approx((101e-6, 100e-6, 104e-6))  # in the order in which they ran
    assert found.operations == pytest.approx({"rpa_decode.1": 100e-6, "copy-done": 1e-6, "fusion": 0.5e-6})


def test_other_programs_and_other_lines_do_not_count() -> None:
    text = (HERE / "tpu.xplane.txt").read_text()
    assert "jit_helper" in text
    assert "Sparse Core Modules" in text
    assert "/host:CPU" in text
    assert len(device_times(trace(), 3).calls) == 3


def test_of_several_devices_the_slowest_counts_at_each_call() -> None:
    text = (HERE / "tpu.xplane.txt").read_text()
    other = text[text.index("planes {") : text.index("# end of the device")].replace("TPU:0", "TPU:1")
    other = other.replace("101000000", "150000000").replace("104000000", "90000000")
    found = device_times(ProfileData.from_text_proto(text + other), 3)
    assert found.calls == pytest.approx((150e-6, 100e-6, 104e-6))


def test_another_number_of_executions_is_no_device_time() -> None:
    with pytest.raises(NoDeviceTime, match=r"/device:TPU:0 has 3 executions of jit_rpa\(1234\); must be 4"):
        device_times(trace(), 4)


def test_a_device_without_the_line_is_no_device_time() -> None:
    with pytest.raises(NoDeviceTime, match="no device with a line of XLA Modules"):
        device_times(trace(('name: "XLA Modules"', 'name: "Stream #13"')), 3)


def test_the_trace_of_a_cpu_is_no_device_time() -> None:
    with pytest.raises(NoDeviceTime, match="no device with a line of XLA Modules"):
        device_times(ProfileData.from_file(str(HERE / "cpu.xplane.pb")), 3)


def test_times_without_operations_are_times() -> None:
    found = device_times(trace(('name: "XLA Ops"', 'name: "Other"')), 3)
    assert isinstance(found, DeviceTimes)
    assert found.operations == {}


def test_the_profiler_of_this_machine_is_asked_and_knows_no_device() -> None:
    class Adds:
        array = jnp.zeros(8)

        def __call__(self) -> None:
            self.array = self.array + 1

        def wait(self) -> None:
            self.array.block_until_ready()

    adds = Adds()
    with pytest.raises(NoDeviceTime, match="the profile has no device with a line of XLA Modules"):
        profiled(adds, 3)
    assert adds.array.tolist() == [3.0] * 8
