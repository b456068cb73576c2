"""The session on a tiny bundle: requests, state, batches, threads, statistics, overhead."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pytest

from blockcache.runtime import (
    Alignment,
    Cancelled,
    ConfigError,
    EmptyBackend,
    EngineError,
    InputError,
    MissingExtraError,
    Schedule,
    Session,
    SolverConfig,
)
from blockcache.runtime.devices.device_view import DeviceView
from blockcache.runtime.devices.host import HostDevice
from blockcache.runtime.engines import ort
from blockcache.runtime.session import SHAPES
from blockcache.runtime.solvers.solver import solver_tables

STEPS = 6


@pytest.fixture(scope="module")
def bundle(compiled):
    return compiled("sd")[1]


@pytest.fixture(scope="module")
def sdxl(compiled):
    return compiled("sdxl")[1]


def preset_of(bundle, recompute, base="ddim-4", **changes):
    """A preset like ``base`` with another schedule; time rows are repeated where there are more."""
    found = bundle.preset(base)
    schedule = Schedule(np.asarray(recompute, bool))
    rows = np.arange(schedule.steps) % found.schedule.steps
    return replace(
        found,
        name="made",
        solver={**found.solver, "steps": schedule.steps},
        schedule=schedule,
        alignment=Alignment.identity(schedule.steps, bundle.model.block_channels),
        time_tables={name: table[rows] for name, table in found.time_tables.items()},
        **changes,
    )


def random_schedule(bundle, steps=STEPS, seed=3):
    table = np.random.default_rng(seed).random((steps, len(bundle.model.blocks))) < 0.5
    table[0] = True
    return table


@pytest.fixture(scope="module")
def session(bundle):
    """Six DDIM steps of which about half the blocks are reused, on ONNX Runtime."""
    return Session(bundle, preset_of(bundle, random_schedule(bundle)), ort.OrtBackend())


def fresh(session):
    return Session(session.bundle, session.preset, ort.OrtBackend())


def prompts(count=1, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 7, 32)).astype(np.float32)


def request(session, seeds=(0,), **changes):
    """Keyword arguments of a valid guided request."""
    values = {
        "noise": session.noise(list(seeds)),
        "prompt_embeds": prompts(len(seeds)),
        "negative_prompt_embeds": prompts(1, seed=99),
    }
    return {**values, **changes}


def relative(a, b):
    return float(np.abs(a - b).max() / np.abs(b).max())


# -- solvers that add noise ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noisy(bundle):
    """Euler ancestral on the levels of dpm-20, on empty engines."""
    found = bundle.preset("dpm-20")
    return Session(
        bundle, replace(found, solver={**found.solver, "solver": "euler-a"}), EmptyBackend()
    )


def test_a_solver_that_adds_noise_needs_a_seed_an_image(noisy):
    asks = request(noisy, (0, 1))
    with pytest.raises(InputError) as caught:
        noisy.denoise(**asks)
    assert str(caught.value) == (
        "seeds: expected 2 whole numbers, one an image, got None. The preset's solver adds fresh "
        "noise at every step: pass the seeds that session.noise was given."
    )
    for seeds, got in (([1], "got 1"), (3, "got 3"), ("01", "got '01'"), ([1, -1], "got -1")):
        with pytest.raises(InputError, match=f"^seeds: expected .*{got}"):
            noisy.denoise(**asks, seeds=seeds)


def test_noise_follows_from_the_seeds_alone(noisy):
    asks = request(noisy, (0, 1))
    drawn = [noisy.denoise(**asks, seeds=seeds).latents for seeds in ([5, 6], [5, 7], [5, 6])]
    assert np.array_equal(drawn[0], drawn[2])
    assert np.array_equal(drawn[0][0], drawn[1][0])
    assert not np.array_equal(drawn[0][1], drawn[1][1])
    noisy.warm_up(images=2)


def test_other_solvers_do_not_read_seeds(session):
    with_seeds, without = (session.denoise(**request(session), **s) for s in ({"seeds": [9]}, {}))
    assert np.array_equal(with_seeds.latents, without.latents)
    with pytest.raises(InputError, match=r"^seeds: expected 1 whole numbers, .*, got 2\.$"):
        session.denoise(**request(session), seeds=[1, 2])


# -- refused requests ------------------------------------------------------------------------------


def refusal(session, **changes):
    with pytest.raises(InputError) as caught:
        session.denoise(**request(session, **changes))
    return str(caught.value)


@pytest.mark.parametrize("shape", [(4, 16, 16), (1, 3, 16, 16), (0, 4, 16, 16), ()])
def test_noise_of_a_wrong_shape_is_refused(session, shape):
    assert refusal(session, noise=np.zeros(shape, np.float32)) == (
        f"noise: expected [N, 4, height, width], got {list(shape)}. session.noise(seeds) makes it."
    )


def test_noise_of_a_wrong_dtype_is_refused(session):
    assert refusal(session, noise=np.zeros((1, 4, 16, 16))) == (
        "noise: expected a numpy array of float32, got float64. "
        "Convert it with .astype(np.float32)."
    )
    assert "got list" in refusal(session, noise=np.zeros((1, 4, 16, 16), np.float32).tolist())


@pytest.mark.parametrize(("height", "width", "nearest"), [(14, 16, "16 x 16"), (16, 18, "16 x 20")])
def test_noise_of_an_indivisible_size_is_refused(session, height, width, nearest):
    assert refusal(session, noise=session.noise([0], height, width)) == (
        f"noise: expected a latent height and width divisible by 4, got {height} x {width}. The "
        f"bundle's graphs halve and double sizes exactly, where diffusers rounds up. Take "
        f"{nearest} and crop the picture."
    )


def test_noise_without_pixels_is_refused(bundle):
    opened = Session.open(bundle, preset="ddim-4", backend="empty")
    assert "noise: expected" in refusal(opened, noise=np.zeros((1, 4, 0, 16), np.float32))


def test_a_missing_prompt_is_refused(session):
    assert refusal(session, prompt_embeds=None) == (
        "encoder_hidden_states: expected a tensor as prompt_embeds, got none."
    )


def test_a_prompt_of_a_wrong_shape_is_refused(session):
    assert refusal(session, prompt_embeds=np.zeros((1, 7, 31), np.float32)) == (
        "encoder_hidden_states: expected shape [1, 7, 32], got [1, 7, 31]."
    )
    assert "expected shape [1, 7, 32], got [7, 32]" in refusal(
        session, prompt_embeds=np.zeros((7, 32), np.float32)
    )
    assert "expected shape [1, 7, 32], got [2, 7, 32]" in refusal(session, prompt_embeds=prompts(2))


def test_a_negative_prompt_of_another_length_is_refused(session):
    assert refusal(session, negative_prompt_embeds=np.zeros((1, 9, 32), np.float32)) == (
        "negative encoder_hidden_states: expected shape [1, 7, 32], got [1, 9, 32]."
    )


def test_a_prompt_of_a_wrong_dtype_is_refused(session):
    text = refusal(session, prompt_embeds=prompts().astype(np.float16))
    assert text.startswith("encoder_hidden_states: expected a numpy array of float32, got float16.")


def test_guidance_without_a_negative_prompt_is_refused(session):
    assert refusal(session, negative_prompt_embeds=None) == (
        "negative encoder_hidden_states: expected a tensor, got none. Give it, or set "
        "guidance_scale=1 to run without guidance."
    )


@pytest.mark.parametrize("side", ["conditions", "negative_conditions"])
def test_a_controlnet_residual_is_refused_by_name(session, side):
    residual = {"down_block_additional_residuals": np.zeros((1, 32, 16, 16), np.float32)}
    text = refusal(session, **{side: residual})
    assert text.startswith("down_block_additional_residuals: this model takes the conditions")
    assert "['encoder_hidden_states'] and no other" in text
    assert "ControlNet residuals and adapters are not supported" in text


def test_a_missing_added_condition_is_refused(sdxl):
    opened = Session.open(sdxl, preset="ddim-4", backend="empty")
    assert refusal(opened) == ("text_embeds: this model needs it in conditions={...}, got none.")


def test_added_conditions_of_the_negative_side_default_only_where_they_may(sdxl):
    opened = Session.open(sdxl, preset="ddim-4", backend="empty")
    shapes = {
        c.name: c.shape(dataclasses.replace(sdxl.model.sizes, batch=1))
        for c in sdxl.model.conditions
    }
    added = {
        name: np.zeros(shape, np.float32)
        for name, shape in shapes.items()
        if name != "encoder_hidden_states"
    }
    text = refusal(opened, conditions=added)
    assert text.startswith("negative text_embeds: expected a tensor, got none.")
    negative = {"text_embeds": added["text_embeds"]}
    opened.denoise(**request(opened, conditions=added, negative_conditions=negative))


@pytest.mark.parametrize("start", [-1, STEPS, 100])
def test_a_start_step_out_of_range_is_refused(session, start):
    image = session.noise([1])
    text = refusal(session, start_step=start, image_latents=image)
    assert text == f"start_step: expected a whole number of 0 to {STEPS - 1}, got {start}."


def test_a_late_start_without_an_image_is_refused(session):
    assert refusal(session, start_step=2) == (
        "start_step=2 continues from an image or a run: expected image_latents or latents, got "
        "none. Give them, or start at step 0."
    )


def test_a_run_in_two_parts_is_the_whole_run(compiled):
    """Uncached, with a solver that remembers nothing."""
    session = Session.open(compiled("sd")[1], preset="ddim-4", verify=False)
    given = request(session)
    whole = session.denoise(**given).latents
    first = session.denoise(**given, end_step=2)
    assert first.record.steps == range(2)
    given["noise"] = None
    second = session.denoise(**given, latents=first.latents, start_step=2)
    np.testing.assert_allclose(second.latents, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["noise", "image_latents"])
def test_latents_of_another_run_stand_alone(session, name):
    given = {"noise": None, "latents": session.noise([1]), "start_step": 2}
    text = refusal(session, **{**given, name: session.noise([1])})
    assert text.startswith(f"{name}: expected none beside latents, which are taken as the run")


@pytest.mark.parametrize("end", [2, STEPS + 1])
def test_an_end_step_out_of_range_is_refused(session, end):
    text = refusal(session, start_step=2, image_latents=session.noise([1]), end_step=end)
    assert text == f"end_step: expected a whole number of 3 to {STEPS}, got {end}."


def test_a_share_of_the_noise_schedule_is_a_step(session):
    """As diffusers counts ``denoising_end``: timesteps from the cutoff on."""
    cutoff = round(1000 - 0.6 * 1000)
    assert session.step_at(0.6) == sum(session.timesteps >= cutoff)
    for share in (0, 1, 1e-9, 1.5):
        with pytest.raises(InputError, match="a share of the noise schedule, 0 to 1, with a step"):
            session.step_at(share)


def test_image_latents_of_another_shape_are_refused(session):
    text = refusal(session, start_step=2, image_latents=session.noise([1, 2]))
    assert text == "image_latents: expected shape [1, 4, 16, 16], got [2, 4, 16, 16]."


@pytest.mark.parametrize("name", ["noise", "prompt_embeds", "negative_prompt_embeds"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused_where_asked(session, name, value):
    values = request(session)[name].copy()
    values.flat[5] = value
    text = refusal(session, **{name: values}, check_finite=True)
    assert f"expected finite numbers, got NaN or infinity in 1 of {values.size}" in text


def test_a_result_that_is_not_finite_is_refused_where_asked(session):
    huge = np.full((1, 7, 32), 3e38, np.float32)
    text = refusal(session, prompt_embeds=huge, check_finite=True)
    assert text.startswith("the denoised latents: expected finite numbers")


# -- arguments that are no numbers, or too small ---------------------------------------------------

NUMBERS = [float("nan"), float("inf"), -float("inf"), True, "7.5", [3.0, 5.0], np.ones(2), 1 + 0j]


@pytest.mark.parametrize("name", ["guidance_scale", "guidance_rescale"])
@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_guidance_that_is_no_finite_number_is_refused(session, name, value):
    got = repr(value) if isinstance(value, bool | float | str) else type(value).__name__
    assert refusal(session, **{name: value}) == (
        f"{name}: expected one finite number, got {got}. Pass a float."
    )


@pytest.mark.parametrize("scale", [1, 1.0, 0.5, 0, -3, np.float32(1), np.int64(0)])
def test_a_guidance_scale_of_one_or_less_is_off_as_in_diffusers(session, scale):
    """0 used to draw the negative prompt alone."""
    plain = session.denoise(**request(session), guidance_scale=1.0).latents
    alone = request(session, negative_prompt_embeds=None)
    np.testing.assert_array_equal(session.denoise(**alone, guidance_scale=scale).latents, plain)


@pytest.mark.parametrize("start", [3.0, True, "2", None, [1], np.float32(2)], ids=repr)
def test_a_start_step_that_is_no_whole_number_is_refused(session, start):
    text = refusal(session, start_step=start, image_latents=session.noise([1]))
    assert text == (
        f"start_step: expected a whole number of 0 to {STEPS - 1}, got {start!r}. Pass an int."
    )


def test_numpy_integers_are_whole_numbers(session):
    late = {"image_latents": session.noise([9]), "start_step": np.int64(2)}
    assert session.denoise(**request(session), **late).record.steps == range(2, STEPS)
    np.testing.assert_array_equal(session.noise(np.arange(2)), session.noise([0, 1]))


@pytest.mark.parametrize("seed", [1.5, 2.0, True, "7", None, -1], ids=repr)
def test_a_seed_that_is_no_whole_number_is_refused(session, seed):
    advice = "" if seed == -1 else " Pass an int."
    with pytest.raises(InputError) as caught:
        session.noise([0, seed])
    assert str(caught.value) == (
        f"seeds: expected a whole number of 0 or more, got {seed!r}.{advice}"
    )


def test_seeds_are_a_list_with_one_for_each_image(session):
    with pytest.raises(InputError) as caught:
        session.noise([])
    assert str(caught.value) == "seeds: expected one for each image, got an empty list."
    for seeds in (5, "12", None):
        with pytest.raises(InputError) as caught:
            session.noise(seeds)
        assert str(caught.value) == f"seeds: expected a list of whole numbers, got {seeds!r}."


@pytest.mark.parametrize("name", ["height", "width"])
@pytest.mark.parametrize("size", [0, -8, 16.0, True, "16", 10**9], ids=repr)
def test_a_size_that_is_no_whole_number_is_refused(session, name, size):
    with pytest.raises(InputError, match=rf"^{name}: expected a whole number of 1 to 65536, got "):
        session.noise([0], **{name: size})


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"], ids=repr)
def test_threads_that_are_no_whole_number_are_refused(bundle, threads):
    with pytest.raises(ConfigError, match=r"^threads: expected a whole number of 1 or more, got "):
        Session.open(bundle, preset="ddim-4", backend="ort", threads=threads)


# -- state -----------------------------------------------------------------------------------------


def test_denoising_twice_gives_the_same_bits(session):
    first = session.denoise(**request(session)).latents
    np.testing.assert_array_equal(session.denoise(**request(session)).latents, first)


def test_a_result_is_not_overwritten_by_the_next_request(session):
    first = session.denoise(**request(session)).latents
    kept = first.copy()
    session.denoise(**request(session, seeds=[5]))
    np.testing.assert_array_equal(first, kept)


def test_a_cancelled_request_leaves_nothing_behind(session):
    asked = []

    def cancelled():
        asked.append(None)
        return len(asked) == 4

    with pytest.raises(Cancelled, match=rf"Cancelled before step 3 of {STEPS}\."):
        session.denoise(**request(session, seeds=[8]), cancelled=cancelled)
    after = session.denoise(**request(session)).latents
    np.testing.assert_array_equal(after, fresh(session).denoise(**request(session)).latents)


def test_a_request_full_of_nan_leaves_nothing_behind(session):
    nan = np.full_like(session.noise([0]), np.nan)
    assert np.isnan(session.denoise(**request(session, noise=nan)).latents).all()
    after = session.denoise(**request(session)).latents
    np.testing.assert_array_equal(after, fresh(session).denoise(**request(session)).latents)


def test_a_multistep_solver_forgets_its_history_too(bundle):
    """DPM-Solver++ carries a tensor from step to step: a poisoned one must not survive."""
    opened = Session.open(bundle, preset="dpm-20")
    expected = opened.denoise(**request(opened)).latents
    nan = np.full_like(opened.noise([0]), np.nan)
    opened.denoise(**request(opened, noise=nan))
    np.testing.assert_array_equal(opened.denoise(**request(opened)).latents, expected)


def test_a_callback_that_raises_does_not_lock_the_session(session):
    def fail(progress):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        session.denoise(**request(session), callback=fail)
    assert np.isfinite(session.denoise(**request(session)).latents).all()


def test_a_session_of_many_shapes_keeps_them_apart(session):
    expected = session.denoise(**request(session)).latents
    session.denoise(**request(session, noise=session.noise([3], 24, 40)))
    session.denoise(**request(session, seeds=[1, 2]))
    session.denoise(**request(session, negative_prompt_embeds=None, guidance_scale=1))
    np.testing.assert_array_equal(session.denoise(**request(session)).latents, expected)


def test_a_callback_cannot_start_another_request_on_the_same_buffers(session):
    with pytest.raises(ConfigError, match="called from a callback of the same session"):
        session.denoise(**request(session), callback=lambda at: session.denoise(**request(session)))
    session.denoise(**request(session))


# -- callback, seeds, batches ----------------------------------------------------------------------


def test_the_callback_hears_every_step_in_order(session):
    heard = []
    result = session.denoise(
        **request(session), callback=lambda p: heard.append((p, p.latents.copy()))
    )
    timesteps = solver_tables(SolverConfig.from_json(session.preset.solver)).timesteps
    assert [p.step for p, _ in heard] == list(range(STEPS))
    assert {p.steps for p, _ in heard} == {STEPS}
    assert [p.timestep for p, _ in heard] == timesteps.tolist()
    np.testing.assert_array_equal(heard[-1][1], result.latents)
    assert not np.array_equal(heard[0][1], heard[1][1])


def test_cancellation_is_asked_once_before_every_step(session):
    order = []
    session.denoise(
        **request(session),
        callback=lambda p: order.append(p.step),
        cancelled=lambda: bool(order.append("asked")),
    )
    assert order == [item for step in range(STEPS) for item in ("asked", step)]


def test_a_seed_gives_the_same_noise_in_any_batch(session):
    both = session.noise([7, 8])
    assert both.dtype == np.float32
    np.testing.assert_array_equal(both[1:], session.noise([8]))
    assert not np.array_equal(both[0], both[1])
    assert abs(float(session.noise([0], 64, 64).std()) - 1) < 0.05  # 16384 samples: 5 sigma is 0.03


def test_an_image_is_the_same_alone_and_in_a_batch(session):
    """Only the order of sums inside one operator may differ: a few float32 roundings a step."""
    batch = session.denoise(**request(session, seeds=[0, 1, 2])).latents
    for index, seed in enumerate([0, 1, 2]):
        text = prompts(3)[index : index + 1]
        alone = session.denoise(**request(session, seeds=[seed], prompt_embeds=text)).latents
        assert relative(batch[index], alone[0]) < 1e-5


def test_one_prompt_serves_a_whole_batch(session):
    once = session.denoise(**request(session, seeds=[0, 1], prompt_embeds=prompts(1))).latents
    twice = np.repeat(prompts(1), 2, axis=0)
    each = session.denoise(**request(session, seeds=[0, 1], prompt_embeds=twice)).latents
    np.testing.assert_array_equal(once, each)


def test_without_guidance_the_negative_prompt_does_not_matter(session):
    plain = {"guidance_scale": 1.0}
    a = session.denoise(**request(session), **plain).latents
    b = session.denoise(**request(session, negative_prompt_embeds=None), **plain).latents
    np.testing.assert_array_equal(a, b)
    guided = session.denoise(**request(session)).latents
    assert relative(guided, a) > 1e-3


def test_guidance_between_equal_prompts_is_no_guidance(session):
    """u + s (c - u) with c = u: only rounding, times the scale, remains."""
    same = session.denoise(**request(session, negative_prompt_embeds=prompts(1))).latents
    plain = session.denoise(**request(session), guidance_scale=1.0).latents
    assert relative(same, plain) < 1e-4


def test_a_guidance_rescale_changes_guided_requests_only(session):
    plain = session.denoise(**request(session), guidance_scale=7.0).latents
    rescaled = session.denoise(**request(session), guidance_scale=7.0, guidance_rescale=0.7).latents
    assert relative(rescaled, plain) > 1e-3
    unguided = session.denoise(**request(session), guidance_scale=1.0).latents
    again = session.denoise(**request(session), guidance_scale=1.0, guidance_rescale=0.7).latents
    np.testing.assert_array_equal(unguided, again)
    assert "guidance_rescale: expected 0" in refusal(session, guidance_rescale=-1)


def test_guidance_of_the_preset_is_the_default(session):
    default = session.denoise(**request(session)).latents
    given = session.denoise(**request(session), guidance_scale=session.preset.guidance_scale)
    np.testing.assert_array_equal(default, given.latents)


# -- callbacks that edit ---------------------------------------------------------------------------


def test_a_callback_that_only_looks_changes_no_bit(session):
    plain = session.denoise(**request(session)).latents
    looked = session.denoise(**request(session), callback=lambda at: at.latents.sum()).latents
    np.testing.assert_array_equal(looked, plain)


def test_an_edit_after_the_last_step_is_in_the_result(session):
    def blacken(at):
        if at.step == STEPS - 1:
            at.latents[...] = 0

    result = session.denoise(**request(session), callback=blacken)
    assert not result.latents.any()


class FarDevice(HostDevice):
    """Memory that the host does not see, as on a GPU; only this device can find it."""

    def __init__(self):
        self.near = {}

    def tensor(self, memory, offset, shape, dtype):
        near = super().tensor(memory, offset, shape, dtype)
        self.near[near.pointer, near.shape, near.dtype] = near
        return replace(near, array=None)

    def of(self, tensor):
        return self.near[tensor.pointer, tensor.shape, tensor.dtype]

    def upload(self, target, values):
        super().upload(self.of(target), values)

    def download(self, source):
        return super().download(self.of(source))

    def row_loader(self, row, table):
        return super().row_loader(self.of(row), self.of(table))

    def solver(self, coefficients, guidance, seeds, *tensors):
        return super().solver(coefficients, guidance, seeds, *map(self.of, tensors))

    def model_input(self, scales, *tensors):
        return super().model_input(scales, *map(self.of, tensors))

    def view(self, tensor):
        return DeviceView(tensor, 0, 0)


class FarBackend(EmptyBackend):
    name = "far"

    def __init__(self):
        self.device = FarDevice()


def latents_after(opened, edit):
    """Final latents of a run whose callback may edit after each step."""
    return opened.denoise(**request(opened), guidance_scale=3.0, callback=edit).latents


def test_edits_count_alike_on_the_host_and_on_a_device(bundle):
    """Empty engines: the latents go by the solver alone, which is linear in what a callback left.

    The model output is empty too, so that a run of which step 3's latents are doubled ends at twice
    the latents.
    """
    host = Session.open(bundle, preset="ddim-4", backend="empty")
    device = Session.open(bundle, preset="ddim-4", backend=FarBackend())

    def edit_on_host(at):
        if at.step == 2:
            at.latents *= 2

    def edit_on_device(at):
        if at.step == 2:
            interface = at.device_latents.__cuda_array_interface__
            where = (interface["data"][0], interface["shape"], "float32")
            device.backend.device.near[where].array[...] *= 2

    plain = latents_after(host, None)
    np.testing.assert_allclose(latents_after(host, edit_on_host), 2 * plain, rtol=1e-6)
    np.testing.assert_array_equal(latents_after(device, None), plain)
    np.testing.assert_allclose(latents_after(device, edit_on_device), 2 * plain, rtol=1e-6)


def test_a_host_copy_of_device_latents_cannot_be_edited_in_vain(bundle):
    device = Session.open(bundle, preset="ddim-4", backend=FarBackend())
    with pytest.raises(ValueError, match="read-only"):
        latents_after(device, lambda at: np.multiply(at.latents, 2, out=at.latents))


@pytest.mark.parametrize("backend", [EmptyBackend, FarBackend])
def test_latents_can_be_replaced_on_every_device(bundle, backend):
    opened = Session.open(bundle, preset="ddim-4", backend=backend())

    def replace_last(at):
        if at.step == 3:
            at.latents = 5 * np.ones((1, 4, 16, 16))

    assert (latents_after(opened, replace_last) == 5).all()
    with pytest.raises(InputError) as caught:
        latents_after(opened, lambda at: setattr(at, "latents", np.ones(3)))
    assert str(caught.value) == ("progress.latents: expected shape [1, 4, 16, 16], got [3].")


# -- the life of a session -------------------------------------------------------------------------


def test_a_closed_session_has_let_go_of_engines_and_memory(bundle):
    backend = CountingBackend("closing")
    opened = Session.open(bundle, preset="ddim-4", backend=backend)
    opened.denoise(**request(opened))
    engines = [weakref.ref(engine) for engine in opened._engines.values()]
    opened.close()
    opened.close()
    assert [engine() for engine in engines] == [None] * len(engines)
    assert not opened._programs


def test_a_closed_session_refuses_to_work(bundle):
    with Session.open(bundle, preset="ddim-4", backend="empty") as opened:
        values = request(opened)
        opened.denoise(**values)
    calls = [lambda: opened.denoise(**values), opened.memory, opened.launches, opened.warm_up]
    for call in calls:
        with pytest.raises(ConfigError) as caught:
            call()
        assert str(caught.value) == (
            "Expected an open session, this one is closed. Open another: Session.open."
        )


def test_another_session_on_the_same_engines_goes_on(session):
    other = fresh(session)
    expected = session.denoise(**request(session)).latents
    other.close()
    np.testing.assert_array_equal(session.denoise(**request(session)).latents, expected)


def test_a_callback_cannot_close_its_session(session):
    with pytest.raises(ConfigError, match="close was called from a callback of the same session"):
        session.denoise(**request(session), callback=lambda at: session.close())
    session.denoise(**request(session))


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_session_says_what_to_do_instead_of_copying_it(session, duplicate):
    with pytest.raises(ConfigError) as caught:
        duplicate(session)
    assert str(caught.value) == (
        "A session cannot be pickled or copied: it holds engines and memory of this process. Hand "
        "over the bundle's folder and the preset's name, and call Session.open there."
    )


def test_a_warm_session_allocates_nothing_for_its_first_request(bundle):
    backend = MeteredBackend()
    opened = Session.open(bundle, preset="ddim-4", backend=backend)
    opened.warm_up(2, 24, 16)
    before = backend.device.allocations
    opened.denoise(**request(opened, seeds=[0, 1], noise=opened.noise([0, 1], 24, 16)))
    assert backend.device.allocations == before > 0
    opened.warm_up(2, 24, 16, guided=False)
    assert backend.device.allocations > before


def test_warming_up_leaves_results_as_they_are(session):
    expected = session.denoise(**request(session)).latents
    warmed = fresh(session)
    warmed.warm_up()
    np.testing.assert_array_equal(warmed.denoise(**request(warmed)).latents, expected)
    with pytest.raises(InputError, match=r"^images: expected a whole number of 1 or more, got 0\."):
        session.warm_up(0)


def test_two_sessions_in_two_threads_work_as_alone(session):
    others = [fresh(session), fresh(session)]
    expected = [session.denoise(**request(session, seeds=[seed])).latents for seed in (0, 1)]

    def work(index):
        made = others[index]
        return [made.denoise(**request(made, seeds=[index])).latents for _ in range(3)]

    with ThreadPoolExecutor(2) as pool:
        for index, results in enumerate(pool.map(work, (0, 1))):
            for latents in results:
                np.testing.assert_array_equal(latents, expected[index])


def test_one_session_may_be_called_from_two_threads(session):
    expected = {seed: session.denoise(**request(session, seeds=[seed])).latents for seed in (0, 1)}
    with ThreadPoolExecutor(2) as pool:
        jobs = [0, 1, 0, 1]
        made = pool.map(lambda seed: session.denoise(**request(session, seeds=[seed])), jobs)
        for seed, result in zip(jobs, made, strict=True):
            np.testing.assert_array_equal(result.latents, expected[seed])


# -- engines: counted, shared, skipped -------------------------------------------------------------


@dataclass
class CountingEngine:
    """Wraps an engine and writes down every launch."""

    inner: object
    name: str
    launched: list

    __hash__ = object.__hash__

    def bind(self, tensors):
        launch = self.inner.bind(tensors)

        def counted():
            self.launched.append(self.name)
            launch()

        return counted


class CountingBackend(EmptyBackend):
    """Counts what is loaded and launched; ``name`` keeps its engines apart from other tests'."""

    def __init__(self, name):
        super().__init__()
        self.name, self.loaded, self.launched = name, [], []

    def load(self, bundle, segment):
        self.loaded.append(segment.name)
        return CountingEngine(super().load(bundle, segment), segment.name, self.launched)


def test_sessions_share_engines_and_free_them(bundle):
    backend = CountingBackend("sharing")
    first = Session.open(bundle, preset="ddim-4", backend=backend)
    loaded = list(backend.loaded)
    assert len(loaded) == len(set(loaded))
    second = Session.open(bundle, preset="dpm-20", backend=backend)
    assert backend.loaded == loaded
    del first, second
    Session.open(bundle, preset="ddim-4", backend=backend)
    assert backend.loaded == 2 * loaded


def test_only_engines_of_the_loop_and_the_prompt_are_loaded(bundle):
    backend = CountingBackend("roles")
    Session.open(bundle, preset="ddim-4", backend=backend)
    roles = {segment.name: segment.role for segment in bundle.segments}
    assert {roles[name] for name in backend.loaded} == {"prompt", "trunk", "block"}


def test_a_reused_block_is_never_launched(bundle):
    table = random_schedule(bundle)
    table[1:, 0] = False  # computed once, reused ever after
    backend = CountingBackend("launches")
    made = Session(bundle, preset_of(bundle, table), backend)
    made.denoise(**request(made))
    for segment in bundle.segments:
        expected = {"prompt": 1, "trunk": STEPS, "time": 0, "whole": 0}.get(segment.role)
        if segment.block is not None:
            expected = int(table[:, segment.block].sum())
        assert backend.launched.count(segment.name) == expected, segment.name


def test_the_record_says_what_was_launched(session):
    result = session.denoise(**request(session))
    record, table = result.record, session.preset.schedule.recompute
    for index, segment in enumerate(record.segments):
        expected = np.ones(STEPS, bool) if segment.block is None else table[:, segment.block]
        np.testing.assert_array_equal(record.ran[:, index], expected, segment.name)
    assert ((record.segment_ns > 0) == record.ran).all()
    assert record.total_ns >= record.segment_ns.sum()
    flops = np.array([s.flops for s in record.segments if s.role == "block"])
    assert record.computed_fraction == pytest.approx(
        session.preset.schedule.computed_fraction(flops), rel=1e-12
    )
    summary = record.summary()
    assert summary["steps"] == STEPS
    assert summary["launches"] == int(record.ran.sum())
    assert set(record.mean_ms()) == {segment.name for segment in record.segments}


def test_segments_stand_in_the_record_in_running_order(session):
    names = [s.name for s in session.denoise(**request(session)).record.segments]
    in_loop = [s.name for s in session.bundle.segments if s.role in ("condition", "trunk", "block")]
    assert names == in_loop


# -- late start ------------------------------------------------------------------------------------


def test_a_late_start_recomputes_all_at_its_first_step(session):
    start = 2
    table = session.preset.schedule.recompute
    assert not table[start].all()  # else the test shows nothing
    result = session.denoise(**request(session, image_latents=session.noise([9]), start_step=start))
    record = result.record
    assert record.steps == range(start, STEPS)
    assert not record.ran[:start].any()
    assert record.ran[start].all()
    blocks = [index for index, s in enumerate(record.segments) if s.role == "block"]
    np.testing.assert_array_equal(record.ran[start + 1 :, blocks], table[start + 1 :])
    assert record.summary()["steps"] == STEPS - start


def test_a_late_start_does_not_read_an_earlier_request(session):
    late = {"image_latents": session.noise([9]), "start_step": 2}
    expected = fresh(session).denoise(**request(session), **late).latents
    session.denoise(**request(session, noise=np.full_like(session.noise([0]), np.nan)))
    np.testing.assert_array_equal(session.denoise(**request(session), **late).latents, expected)


def test_the_callback_of_a_late_start_counts_from_there(session):
    heard = []
    late = {"image_latents": session.noise([9]), "start_step": 4}
    session.denoise(**request(session), **late, callback=lambda p: heard.append(p.step))
    assert heard == [4, 5]


def test_a_start_at_the_last_step_stays_near_the_image(session):
    """One DDIM step from the lowest noise level: the image is most of the sample."""
    image = session.noise([9])
    signal, noise = solver_tables(SolverConfig.from_json(session.preset.solver)).noising[-1]
    assert signal > 0.99 > noise
    late = {"image_latents": image, "start_step": STEPS - 1}
    result = session.denoise(**request(session), **late, guidance_scale=1.0).latents
    assert np.corrcoef(result.ravel(), image.ravel())[0, 1] > 0.9


# -- the loop allocates nothing --------------------------------------------------------------------

IMAGES, MANY = 16, 100
LATENTS_BYTES = IMAGES * 4 * 16 * 16 * 4
LOOP_BYTES = 8192
"""Bound on what 100 steps may add at their peak. The loop makes small objects that die at once:
two views of the record's rows, clock integers, one Progress; the record keeps nothing per step.
Measured at about 1 kB. The smallest tensor of this request, the latents, has 65536 bytes, so one
that is allocated anywhere in a step breaks the bound eightfold."""


def peak_growth(bundle, backend):
    """Most traced bytes that steps 1 to 99 hold above what was held after step 0."""
    schedule = np.ones((MANY, len(bundle.model.blocks)), bool)
    made = Session(bundle, preset_of(bundle, schedule), backend)
    values = request(made, seeds=range(IMAGES))
    made.denoise(**values)
    held = []

    def watch(progress):
        if progress.step == 0:
            tracemalloc.reset_peak()
            held.append(tracemalloc.get_traced_memory()[0])
        if progress.step == MANY - 1:
            held.append(tracemalloc.get_traced_memory()[1])

    tracemalloc.start()
    try:
        made.denoise(**values, callback=watch)
    finally:
        tracemalloc.stop()
    return held[1] - held[0]


def test_a_hundred_steps_allocate_no_tensor(bundle):
    assert peak_growth(bundle, EmptyBackend()) < LOOP_BYTES


class WastefulEngine:
    """Allocates one latent-sized array a launch: what the guard above must see."""

    def bind(self, tensors):
        return lambda: np.zeros(LATENTS_BYTES, np.uint8)[0]


class WastefulBackend(EmptyBackend):
    name = "wasteful"

    def load(self, bundle, segment):
        return WastefulEngine()


def test_the_allocation_guard_fires(bundle):
    assert peak_growth(bundle, WastefulBackend()) >= LATENTS_BYTES > LOOP_BYTES


def test_empty_engines_run_a_whole_request(bundle):
    made = Session.open(bundle, preset="dpm-20", backend="empty")
    result = made.denoise(**request(made))
    assert result.latents.shape == (1, 4, 16, 16)
    assert result.record.ran.all()


# -- memory of many shapes -------------------------------------------------------------------------


class MeteredDevice(HostDevice):
    """Knows what it handed out and has not got back."""

    def __init__(self):
        self.held = weakref.WeakValueDictionary()
        self.allocations = 0

    def allocate(self, count):
        memory = super().allocate(count)
        self.held[self.allocations] = memory
        self.allocations += 1
        return memory


class MeteredBackend(EmptyBackend):
    name = "metered"

    def __init__(self):
        self.device = MeteredDevice()


def test_memory_is_held_for_the_last_shapes_only(bundle):
    made = Session.open(bundle, preset="ddim-4", backend=MeteredBackend())

    def held(*heights):
        for height in heights:
            made.denoise(**request(made, noise=made.noise([0], height, 16)))
        return len(made.backend.device.held)

    one = held(16)
    assert held(16, 16) == one
    full = held(*range(20, 20 + 4 * (SHAPES - 1), 4))
    assert full == SHAPES * one
    before = made.backend.device.allocations
    assert held(16) == full  # in use again: not the oldest any more
    assert made.backend.device.allocations == before
    assert held(64, 68) == full
    before = made.backend.device.allocations
    held(16)
    assert made.backend.device.allocations == before
    held(20)  # had to go, comes back
    assert made.backend.device.allocations > before


def test_the_loop_asks_its_device_for_nothing(bundle):
    """No tensor is made between the first step and the last: counted at the device."""
    backend = MeteredBackend()
    made = Session.open(bundle, preset="dpm-20", backend=backend)
    made.denoise(**request(made))  # binds
    counts = []
    made.denoise(**request(made), callback=lambda p: counts.append(backend.device.allocations))
    assert counts == [counts[0]] * 20
    assert counts[0] == backend.device.allocations


def test_launches_are_those_of_a_request(session):
    launches = session.launches()
    roles = {"prompt", "trunk", "block"}
    assert set(launches) == {s.name for s in session.bundle.segments if s.role in roles}
    session.denoise(**request(session))
    program = session._programs[session.bundle.model.sizes, 1]
    output = program.tensors["block_0"].array
    expected = output.copy()
    output[...] = 0
    launches["block_00"]()
    assert output.any()
    assert output.shape == expected.shape


# -- options that nobody would read ----------------------------------------------------------------


@pytest.mark.parametrize("option", [{"threads": 2}, {"stream": 7}, {"graphs": "off"}])
def test_a_backend_object_takes_no_options(bundle, option):
    with pytest.raises(ConfigError) as caught:
        Session.open(bundle, preset="ddim-4", backend=EmptyBackend(), **option)
    assert str(caught.value) == (
        f"Expected no {next(iter(option))} with the backend EmptyBackend, which would ignore it. "
        f"Leave it out, or choose the backend by a name that reads it."
    )


@pytest.mark.parametrize(
    ("backend", "option"),
    [("ort", {"stream": 7}), ("ort", {"graphs": "off"}), ("empty", {"threads": 2})],
)
def test_a_named_backend_refuses_what_it_does_not_read(bundle, backend, option):
    with pytest.raises(ConfigError, match=f"^Expected no {next(iter(option))} with the backend '"):
        Session.open(bundle, preset="ddim-4", backend=backend, **option)


# -- backends --------------------------------------------------------------------------------------


def test_an_unknown_backend_lists_the_known_ones(bundle):
    with pytest.raises(ConfigError, match=r"Expected a backend of .*'ort'.*, got 'tvm'\."):
        Session.open(bundle, backend="tvm")


@pytest.mark.parametrize("name", ["ort", "auto"])
def test_a_missing_onnxruntime_is_named_with_the_pip_command(bundle, monkeypatch, name):
    monkeypatch.setattr(ort, "ort", None)
    with pytest.raises(MissingExtraError) as caught:
        Session.open(bundle, backend=name)
    assert str(caught.value) == (
        "Running a bundle on the CPU needs the package onnxruntime, which is not installed. "
        "Install it with: pip install 'blockcache[cpu]'"
    )


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_half_precision_bundle_is_refused_on_the_cpu(bundle, precision):
    model = replace(bundle.model, precision=precision)
    half = replace(bundle, manifest=replace(bundle.manifest, model=model))
    backend = ort.OrtBackend(threads=1)
    backend.name = f"half-{precision}"  # engines are shared by name: these must be loaded anew
    with pytest.raises(EngineError) as caught:
        Session.open(half, preset="ddim-4", backend=backend)
    assert str(caught.value) == (
        f"ONNX Runtime's CPU provider runs float32 bundles; this one is {precision}. Compile with "
        f"--precision float32, or use TensorRT."
    )


def test_a_graph_that_the_library_refuses_is_our_error(bundle):
    segment = next(s for s in bundle.segments if s.name == "trunk_00")
    with pytest.raises(EngineError, match="cannot load segment 'trunk_00': "):
        ort.OrtBackend(threads=1).open_model(segment, b"\xff" * 1000)


def test_a_tensor_that_the_graph_does_not_know_is_our_error(bundle):
    """Where a manifest and its ONNX files disagree."""
    segment = next(s for s in bundle.segments if s.role == "trunk")
    renamed = replace(segment, inputs=tuple(replace(t, name="other") for t in segment.inputs[:1]))
    engine = ort.OrtBackend(threads=1).open_model(renamed, str(bundle.segment_path(segment)))
    device = HostDevice()
    spec = renamed.inputs[0]
    shape = spec.shape(bundle.model.sizes)
    memory = device.allocate(spec.bytes(bundle.model.sizes))
    with pytest.raises(EngineError, match=f"cannot bind 'other' of segment {segment.name!r}: "):
        engine.bind({"other": device.tensor(memory, 0, shape, spec.dtype)})


def test_an_engine_that_fails_in_the_loop_names_its_segment(bundle):
    segment = bundle.segments[0]

    class Broken:
        def run_with_iobinding(self, binding):
            raise RuntimeError("out of memory")

    engine = ort.OrtEngine(segment, Broken())
    with pytest.raises(EngineError) as caught:
        engine._launch(None)
    assert str(caught.value) == (f"ONNX Runtime failed in segment {segment.name!r}: out of memory")


@pytest.mark.parametrize("name", ["ddim-4", "dpm-20"])
def test_the_default_preset_is_the_recommended_one(bundle, name):
    manifest = dataclasses.replace(bundle.manifest, recommended=name)
    opened = dataclasses.replace(bundle, manifest=manifest)
    assert opened.recommended == name
    assert opened.preset().name == name
    assert Session.open(opened, backend="empty").preset.name == name
