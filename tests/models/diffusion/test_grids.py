"""Grids: their ends, that they fall, what each is spaced by, and refusals."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.diffusion.grids import karras_grid, log_snr_grid, sgm_uniform_grid, uniform_grid, warped_grid
from models.diffusion.schedules import CosineSchedule, EDMSchedule, FlowSchedule, LinearSchedule, Schedule

SCHEDULES = [
    FlowSchedule(), FlowSchedule(3.0), CosineSchedule(), EDMSchedule(), EDMSchedule(sigma_max=10.0),
    LinearSchedule(), LinearSchedule(zero_terminal=True),
]  # fmt: skip
GRIDS = [uniform_grid, log_snr_grid, karras_grid, sgm_uniform_grid, warped_grid]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 250])
def test_grids_fall_from_1_to_0(
    schedule: Schedule, grid: Callable[[Schedule, int], Tensor], num_steps: int
) -> None:
    times = grid(schedule, num_steps)
    assert times.shape == (num_steps + 1,)
    assert times.dtype == torch.float32
    assert times[0] == 1
    assert times[-1] == 0
    assert (times.diff() < 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_log_snr_grid_is_even_in_log_snr(schedule: Schedule) -> None:
    gaps = schedule.log_snr(log_snr_grid(schedule, 20, -4.0, 6.0)[1:-1]).diff()
    torch.testing.assert_close(gaps, torch.full_like(gaps, 0.5), rtol=2e-3, atol=1e-3)


def test_karras_grid_has_the_papers_sigmas() -> None:
    i = torch.arange(10, dtype=torch.float64)
    wanted = (80 ** (1 / 7) + i / 9 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    for schedule, first in ((EDMSchedule(), 0), (FlowSchedule(), 1)):
        alpha, sigma = schedule(karras_grid(schedule, 10)[:-1])
        torch.testing.assert_close((sigma / alpha).double()[first:], wanted[first:], rtol=1e-4, atol=0)


def test_sgm_uniform_leaves_the_smallest_time_out() -> None:
    wanted = torch.tensor([1.0, 0.751, 0.502, 0.253, 0.0])
    torch.testing.assert_close(sgm_uniform_grid(FlowSchedule(), 4, last=0.004), wanted)


def test_warped_grid() -> None:
    schedule = FlowSchedule()
    torch.testing.assert_close(warped_grid(schedule, 8, b=1.0), uniform_grid(schedule, 8))
    wanted = [1 - (1 - (1 - i / 4) ** 2) ** 3 for i in range(5)]
    torch.testing.assert_close(warped_grid(schedule, 4, a=2.0, b=3.0), torch.tensor(wanted))
    assert warped_grid(schedule, 8, a=2.0)[4] < 0.5 < warped_grid(schedule, 8, b=2.0)[4]


@pytest.mark.parametrize(
    ("grid", "options", "said"),
    [
        (log_snr_grid, {"lowest": 3.0, "highest": 3.0}, "finite and rise"),
        (log_snr_grid, {"lowest": -math.inf}, "finite and rise"),
        (karras_grid, {"sigma_min": 0.0}, "must be positive"),
        (karras_grid, {"sigma_min": 90.0}, "sigma_min below sigma_max"),
        (karras_grid, {"rho": math.nan}, "must be positive"),
        (sgm_uniform_grid, {"last": 1.0}, "last is 1.0"),
        (warped_grid, {"a": 0.0}, "a and b are 0.0"),
        (warped_grid, {"b": 30.0}, "on the same time"),
    ],
)
def test_options_out_of_range_are_refused(
    grid: Callable[..., Tensor], options: dict[str, float], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        grid(FlowSchedule(), 50, **options)
