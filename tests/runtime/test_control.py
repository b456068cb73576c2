"""At which steps a ControlNet acts: as the pipelines of diffusers count them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockcache.runtime import InputError
from blockcache.runtime.control import control_window

FALLING = st.lists(st.integers(0, 999), min_size=1, max_size=60, unique=True).map(
    lambda times: np.sort(np.array(times, np.float32))[::-1]
)
SHARES = st.tuples(st.floats(0, 1), st.floats(0, 1)).filter(lambda s: s[0] < s[1])


@given(timesteps=FALLING, shares=SHARES, part=st.floats(0, 0.99))
def test_the_same_steps_act_as_in_diffusers(timesteps, shares, part):
    start, end = shares
    first = int(part * len(timesteps))
    run = timesteps[first:]
    # controlnet_keep of StableDiffusionControlNetPipeline
    keep = [1.0 - float(i / len(run) < start or (i + 1) / len(run) > end) for i in range(len(run))]
    ((scale, high, low),) = control_window(timesteps, 0.7, start, end, first)
    acts = scale * ((run <= high) & (run >= low))
    np.testing.assert_array_equal(acts, np.float32(0.7) * np.array(keep, np.float32))


def test_a_run_without_shares_acts_everywhere():
    ((scale, high, low),) = control_window(np.float32([900, 500, 100]), 2, 0.0, 1.0)
    assert scale == 2
    assert high > 1e5
    assert low < -1e5


@pytest.mark.parametrize("shares", [(0.5, 0.5), (-0.1, 1.0), (0.0, 1.1), (0.9, 0.2)])
def test_shares_out_of_range_are_refused(shares):
    with pytest.raises(InputError, match=r"expected 0 <= start < end <= 1, got"):
        control_window(np.float32([900, 500]), 1.0, *shares)


def test_control_cannot_end_between_two_steps_of_one_timestep():
    timesteps = np.float32([900, 500, 500, 100])
    with pytest.raises(InputError, match="steps 1 and 2 are at 500 and 500"):
        control_window(timesteps, 1.0, 0.0, 0.5)
    control_window(timesteps, 1.0, 0.0, 0.75)


def test_numbers_are_checked_by_name():
    with pytest.raises(InputError, match="controlnet_conditioning_scale: expected one finite"):
        control_window(np.float32([1]), "strong", 0.0, 1.0)
    with pytest.raises(InputError, match="control_guidance_end: expected one finite"):
        control_window(np.float32([1]), 1.0, 0.0, float("nan"))
    with pytest.raises(InputError, match="start_step: expected a whole number of 0 to 0"):
        control_window(np.float32([1]), 1.0, 0.0, 1.0, 1)
