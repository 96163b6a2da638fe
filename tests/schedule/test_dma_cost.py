"""What a DMA costs beside its bytes, with the constants of each target: pages of half the size are twice as many DMAs."""

from __future__ import annotations

import pytest

from rpac.schedule import Model, model_of
from rpac.schedule.walk import walk

from .miniature import DELAY, copy_in, operand, schedule, wait

GRANULES = 1 << 15


def seconds(model: Model, dmas: int) -> float:
    """The time of a mebibyte in so many DMAs that start one after another."""
    size = GRANULES // dmas
    first, start = copy_in(model.target, size)[:-1], copy_in(model.target, size)[-1]
    lines = [operand(0, f"f32[{8 * GRANULES}]"), *first, *[start] * dmas, wait(GRANULES)]
    return walk(schedule(model.target, *lines), {}, model).cycles / model.clock_hz


@pytest.mark.parametrize("target", DELAY)
def test_each_further_dma_takes_the_cost_of_one_and_nothing_else(target: str) -> None:
    model = model_of(target)
    # All are queued before the first is over, so only the channel's time shows.
    assert seconds(model, 16) - seconds(model, 8) == pytest.approx(8 * model.setup_s, abs=1e-12)


def test_smaller_pages_take_longer_on_v6e_alone() -> None:
    assert [target for target in DELAY if seconds(model_of(target), 16) > seconds(model_of(target), 8) + 1e-9] == [
        "v6e"
    ]
    assert model_of("v6e").setup_s == 50e-9


def test_a_model_says_which_of_its_constants_are_fitted() -> None:
    fitted = {target: [name for name, source in model_of(target).sources if source == "fitted"] for target in DELAY}
    assert fitted == {
        "tpu7x": ["clock_hz", "latency_s"],
        "v6e": ["latency_s", "setup_s"],
        "v5p": [],
        "v5e": [],
    }
