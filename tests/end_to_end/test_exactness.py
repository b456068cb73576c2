"""Promises 1: the split is exact, and the loop equals the PyTorch reference."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")

from blockcache.export.measure.calibration import Calibration  # noqa: E402
from blockcache.export.measure.change import relative_change  # noqa: E402
from blockcache.export.unet.cached_unet import CachedUNet, Denoiser  # noqa: E402
from blockcache.export.unet.model import BRANCH  # noqa: E402
from blockcache.export.unet.steps import TableSteps  # noqa: E402
from blockcache.runtime import Alignment, ContinuousBatch, Schedule, Session  # noqa: E402
from blockcache.runtime.plan import Sizes  # noqa: E402
from blockcache.runtime.run_table import run_table  # noqa: E402
from blockcache.runtime.solvers.grid import Grid  # noqa: E402
from blockcache.runtime.solvers.solver import SolverConfig, solver_tables  # noqa: E402

RARE = ("depth2img", "upscale")
"""What takes another compile and shows little more: run by ``-m slow``."""

SHAPES = [(1, 16, 16), (2, 8, 8), (3, 24, 40)]


def open_segment(bundle, segment):
    """One thread: idle threads of many sessions would spin."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(bundle.segment_path(segment)), options)


def relative(ours, reference):
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def run_segments(bundle, inputs, sizes):
    """Every segment once, all blocks recomputed, through plain ``run`` calls."""
    tensors = dict(inputs)
    for segment in bundle.segments:
        if segment.role == "whole":
            continue
        feeds = {}
        for spec in segment.inputs:
            if spec.name not in tensors:
                value = 1.0 if spec.name.startswith("scale_") else 0.0
                tensors[spec.name] = np.full(spec.shape(sizes), value, np.float32)
            feeds[spec.name] = tensors[spec.name]
        if segment.role == "time":
            feeds["timestep"] = feeds["timestep"][:1]
        session = open_segment(bundle, segment)
        names = [spec.name for spec in segment.outputs]
        tensors.update(zip(names, session.run(names, feeds), strict=True))
    return tensors["model_output"]


@pytest.mark.parametrize(
    "kind",
    [
        *("sd", "sdxl", "refiner", "pooled-prompt", "two-layers", "one-level"),
        *("class-conditioned", "sdxl-inpaint", "instruct-pix2pix"),
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("inpaint", *RARE)),
    ],
)
def test_segments_equal_the_whole_pytorch_unet(compiled, conditions_of, kind):
    model, bundle = compiled(kind)
    call = model.call()
    for batch, height, width in SHAPES:
        rng = np.random.default_rng(batch)
        sample = rng.standard_normal((batch, 4, height, width)).astype(np.float32)
        timestep = np.full(batch, 371.5, np.float32)
        conditions = conditions_of(model, batch, size=(height, width))
        tensors = [torch.from_numpy(v) for v in (sample, timestep, *conditions.values())]
        reference = call(*tensors).numpy()
        inputs = {"sample": sample, "timestep": timestep, **conditions}
        sizes = Sizes(batch=batch, height=height, width=width, tokens=model.tokens)
        assert relative(run_segments(bundle, inputs, sizes), reference) <= 1e-5
        whole = next(s for s in bundle.segments if s.role == "whole")
        session = open_segment(bundle, whole)
        assert relative(session.run(None, inputs)[0], reference) <= 1e-5


def random_preset(preset, seed, outputs):
    """A random schedule and random alignment on a preset's solver."""
    rng = np.random.default_rng(seed)
    steps, blocks = preset.schedule.recompute.shape
    recompute = rng.random((steps, blocks)) < rng.uniform(0.1, 0.9)
    recompute[0] = True
    tables = []
    for k, table in enumerate(preset.alignment.tables):
        made = 0.1 * rng.standard_normal(table.shape).astype(np.float32)
        made[:, 0] += 1.0
        made[recompute[:, k]] = Alignment.identity(1, (table.shape[2],), outputs).tables[0][0]
        tables.append(made)
    return dataclasses.replace(
        preset, schedule=Schedule(recompute), alignment=Alignment(tuple(tables))
    )


@pytest.mark.parametrize(
    ("kind", "outputs", "cuts"),
    [
        ("sd", 1, ()),
        ("sdxl", 2, ()),
        ("refiner", 1, ()),
        ("pooled-prompt", 1, ()),
        ("sd", 2, (-1, 0, 1, 2)),
        ("sdxl", 1, (-1, 0, 2, 4)),
        ("two-layers", 2, (1, 3)),
        ("sdxl-inpaint", 2, (0, 2)),
        *(pytest.param(kind, 1, (), marks=pytest.mark.slow) for kind in RARE),
    ],
)
@settings(max_examples=2, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    rescale=st.sampled_from([0.0, 0.7]),
    shape=st.sampled_from([(1, 16, 16), (3, 8, 12)]),
)
def test_the_loop_equals_the_reference_under_any_schedule(
    compiled, conditions_of, kind, outputs, cuts, seed, rescale, shape
):
    model, bundle = compiled(kind, outputs, cuts=cuts)
    model = model.cut_at(cuts)
    session = Session.open(bundle, preset="dpm-20", verify=False)
    preset = random_preset(session.preset, seed, outputs)
    session = Session(bundle, preset, session.backend)
    count, *size = shape
    positive = conditions_of(model, count, seed=1, size=size)
    negative = conditions_of(model, 1, seed=2, size=size)
    noise = session.noise(range(count), *size)
    ours = session.denoise(
        noise,
        positive["encoder_hidden_states"],
        negative["encoder_hidden_states"],
        conditions={k: v for k, v in positive.items() if k != "encoder_hidden_states"},
        negative_conditions={k: v for k, v in negative.items() if k != "encoder_hidden_states"},
        guidance_scale=3.0,
        guidance_rescale=rescale,
    )
    tables = solver_tables(SolverConfig.from_json(preset.solver))
    picked = Calibration(positive, negative).pick(range(count), guided=True)
    with CachedUNet(model, outputs) as cached:
        denoiser = Denoiser(cached, TableSteps(tables), picked, 3.0, rescale)
        drawn = denoiser.denoise(torch.from_numpy(noise), preset.schedule, preset.alignment)
    reference = drawn.numpy()
    assert relative(ours.latents, reference) <= 1e-4
    np.testing.assert_array_equal(ours.record.ran, run_table(ours.record.segments, preset.schedule))


def test_guidance_by_an_image_equals_the_reference(compiled, conditions_of):
    """InstructPix2Pix: three samples an image, alone and among other requests of a batch."""
    model, bundle = compiled("instruct-pix2pix")
    opened = Session.open(bundle, preset="ddim-4", verify=False)
    preset = random_preset(opened.preset, 6, 1)
    session, noise = Session(bundle, preset, opened.backend), opened.noise([0, 1], 8, 24)
    positive, negative = (conditions_of(model, 2, seed=s, size=(8, 24)) for s in (1, 2))
    prompts = [side.pop("encoder_hidden_states") for side in (positive, negative)]
    request = {"guidance_scale": 3.0, "image_guidance_scale": 1.5}
    ours = session.denoise(noise, *prompts, conditions=positive, **request).latents
    image = positive["image_latents"]
    thirds = {
        "encoder_hidden_states": np.concatenate([prompts[1], prompts[1], prompts[0]]),
        "image_latents": np.concatenate([np.zeros_like(image), image, image]),
    }
    tensors = {name: torch.from_numpy(values) for name, values in thirds.items()}
    tables = solver_tables(SolverConfig.from_json(preset.solver))
    with CachedUNet(model) as cached:
        denoiser = Denoiser(cached, TableSteps(tables), tensors, 3.0, 0.0, 1.5)
        drawn = denoiser.denoise(torch.from_numpy(noise), preset.schedule, preset.alignment)
    assert relative(ours, drawn.numpy()) <= 1e-4
    uncached = opened.denoise(noise, *prompts, conditions=positive, **request).latents
    with ContinuousBatch.open(
        bundle, slots=3, presets=["ddim-4"], height=8, width=24, backend=opened.backend
    ) as batch:
        plain = {**request, "image_guidance_scale": 1.0}
        futures = [
            batch.submit(
                noise[at : at + 1],
                *(prompt[at : at + 1] for prompt in prompts),
                conditions={"image_latents": image[at : at + 1]},
                **how,
            )
            for at, how in ((0, request), (0, plain), (1, request))
        ]
        first, other, second = (future.result().latents for future in futures)
    assert relative(np.concatenate([first, second]), uncached) <= 1e-4
    assert relative(other, uncached[:1]) > 1e-2


@pytest.mark.parametrize("solver", ["unipc", "euler-a", "dpm-sde", "lcm"])
@pytest.mark.parametrize("start", [0, 7])
def test_solvers_with_two_x0_or_noise_equal_the_reference(compiled, conditions_of, solver, start):
    """On the levels of the bundle's preset, whose time tables they share."""
    model, bundle = compiled("sd", 2)
    opened = Session.open(bundle, preset="dpm-20", verify=False)
    own = SolverConfig.from_json(opened.preset.solver)
    grid = Grid("same", tuple(map(float, opened.sigmas)), tuple(map(float, opened.timesteps)))
    config = SolverConfig(
        solver=solver, steps=20, noise=own.noise, prediction=own.prediction, grid=grid
    )
    preset = dataclasses.replace(random_preset(opened.preset, 5, 2), solver=config.to_json())
    session, tables = Session(bundle, preset, opened.backend), solver_tables(config)
    conditions, noise, image = (
        conditions_of(model, 2, seed=1),
        *np.split(session.noise(range(4)), 2),
    )
    request = {"guidance_scale": 1.0, "start_step": start}
    late = image if start else None
    both = session.denoise(
        noise, conditions["encoder_hidden_states"], image_latents=late, seeds=[3, 4], **request
    ).latents
    tensors = {name: torch.from_numpy(values) for name, values in conditions.items()}
    with CachedUNet(model, 2) as cached:
        reference = Denoiser(cached, TableSteps(tables, [3, 4]), tensors, 1.0).denoise(
            torch.from_numpy(noise),
            preset.schedule,
            preset.alignment,
            image_latents=None if late is None else torch.from_numpy(late),
            start_step=start,
        )
    assert relative(both, reference.numpy()) <= 1e-4
    alone = session.denoise(
        noise[1:],
        conditions["encoder_hidden_states"][1:],
        image_latents=None if late is None else late[1:],
        seeds=[4],
        **request,
    ).latents
    assert relative(alone, both[1:]) <= 1e-4


CUTS = (-1, 0, 1, 2)


@pytest.mark.parametrize("kind", ["sd", "two-layers"])
def test_a_step_that_reuses_a_branch_runs_what_lies_above_it(compiled, kind):
    """And nothing else: no block inside the branch, whatever the schedule says of it."""
    model, bundle = compiled(kind, 2, cuts=CUTS)
    loop = [segment for segment in bundle.segments if segment.role in ("trunk", "block")]
    blocks = model.cut_at(CUTS).blocks
    for cut in CUTS:
        recompute = np.ones((2, len(blocks)), bool)
        recompute[1, [(b.kind, b.depth) for b in blocks].index((BRANCH, cut))] = False
        table = run_table(loop, Schedule(recompute))
        assert table[0].all()
        ran = {segment.block for segment, runs in zip(loop, table[1], strict=True) if runs}
        inside = {k for k, block in enumerate(blocks) if block.depth > cut}
        assert ran.isdisjoint(inside)
        assert {k for k, b in enumerate(blocks) if b.depth <= cut and b.kind != BRANCH} <= ran


def drawing(compiled, conditions_of, outputs, seed, preset="dpm-20"):
    """A session under a random schedule and alignment, its request, and the PyTorch loop's parts.

    Without guidance, whose scale would multiply the rounding errors.
    """
    model, bundle = compiled("sd", outputs)
    opened = Session.open(bundle, preset=preset, verify=False)
    made = random_preset(opened.preset, seed, outputs)
    session = Session(bundle, made, opened.backend)
    conditions = conditions_of(model, 2, seed=1)
    request = {
        "noise": session.noise([0, 1]),
        "prompt_embeds": conditions["encoder_hidden_states"],
        "guidance_scale": 1.0,
    }
    tensors = {name: torch.from_numpy(values) for name, values in conditions.items()}
    return session, request, model, tensors, solver_tables(SolverConfig.from_json(made.solver))


@pytest.mark.parametrize("preset", ["dpm-20", "ddim-4"])
@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("part", [0.25, 0.7, 1.0])
def test_image_to_image_equals_the_reference(compiled, conditions_of, preset, outputs, part):
    """Every block is recomputed at the first executed step, and so nothing may be aligned there;
    the solver has no x0 of a step before, also where the whole run has one."""
    found = drawing(compiled, conditions_of, outputs, seed=3, preset=preset)
    session, request, model, conditions, tables = found
    start = round(part * (session.steps - 1))
    image = session.noise([7, 8])
    late = {"image_latents": image, "start_step": start}
    ours = session.denoise(**request, **late)
    with CachedUNet(model, outputs) as cached:
        reference = Denoiser(cached, TableSteps(tables), conditions, 1.0).denoise(
            torch.from_numpy(request["noise"]),
            session.preset.schedule,
            session.preset.alignment,
            image_latents=torch.from_numpy(image),
            start_step=start,
        )
    assert relative(ours.latents, reference.numpy()) <= 1e-4
    assert ours.record.steps == range(start, session.steps)


@pytest.mark.parametrize("preset", ["dpm-20", "ddim-4"])
def test_edits_in_a_callback_equal_edits_between_the_references_steps(
    compiled, conditions_of, preset
):
    found = drawing(compiled, conditions_of, outputs=1, seed=4, preset=preset)
    session, request, model, conditions, tables = found
    edited = {0, 2}

    def edit(progress):
        if progress.step in edited:
            progress.latents *= 0.5
            progress.latents += 0.25

    ours = session.denoise(**request, callback=edit).latents
    with CachedUNet(model, 1) as cached, torch.no_grad():
        denoiser = Denoiser(cached, TableSteps(tables), conditions, 1.0)
        state = denoiser.start(torch.from_numpy(request["noise"]))
        for step, recompute in enumerate(session.preset.schedule.recompute):
            rows = [table[step] for table in session.preset.alignment.tables]
            state = denoiser.step(state, step, recompute, rows)
            if step in edited:
                state = dataclasses.replace(state, latents=state.latents * 0.5 + 0.25)
    assert relative(ours, state.latents.numpy()) <= 1e-4


class Listener:
    """In a monitor's place: takes any preset, hears nothing."""

    def watch(self, bundle, preset):
        pass

    def add(self, change):
        self.change = change


@pytest.mark.parametrize(("kind", "outputs"), [("sd", 1), ("sdxl", 2)])
def test_the_measured_change_is_the_profiles_own(compiled, conditions_of, kind, outputs):
    """Eq. 6 as ``export/measure/change.py`` has it, between the last two computed outputs."""
    model, bundle = compiled(kind, outputs)
    session = Session.open(bundle, preset="dpm-20", verify=False)
    preset, listener = random_preset(session.preset, 5, outputs), Listener()
    session = Session(bundle, preset, session.backend, listener)
    conditions, noise = conditions_of(model, 2, seed=1), session.noise([0, 1])
    added = {k: v for k, v in conditions.items() if k != "encoder_hidden_states"}
    embeds = conditions["encoder_hidden_states"]
    session.denoise(
        noise, embeds, -embeds, conditions=added, negative_conditions=added, guidance_scale=3.0
    )
    picked = Calibration(conditions, {**added, "encoder_hidden_states": -embeds}).pick([0, 1], True)
    wanted = np.full_like(listener.change, np.nan)
    tables = solver_tables(SolverConfig.from_json(preset.solver))
    with CachedUNet(model, 2) as cached:
        denoiser = Denoiser(cached, TableSteps(tables), picked, 3.0)
        how = (torch.from_numpy(noise), preset.schedule, preset.alignment)
        for step, state in enumerate(denoiser.trajectory(*how)):
            for k, outputs in enumerate(state.kept):
                if len(outputs) == 2 and preset.schedule.recompute[step, k]:
                    wanted[step, k] = relative_change(*outputs, 2)
    np.testing.assert_allclose(listener.change, wanted, rtol=1e-3)
    assert np.isfinite(wanted).any()


def test_the_reference_is_the_model_itself_when_nothing_is_reused(tiny_models, conditions_of):
    model = tiny_models("sd")
    sample = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    conditions = [torch.from_numpy(v) for v in conditions_of(model, 2).values()]
    call = model.call()
    plain = call(sample, torch.full((2,), 7.0), *conditions)
    with CachedUNet(model) as cached:
        fresh, kept = cached(sample, 7.0, conditions)
        assert torch.equal(fresh, plain)
        reused, again = cached(sample, 7.0, conditions, kept, np.zeros(len(model.blocks), bool))
        assert again == kept, "what is reused stays"
        # The same step again: what is reused is what would be computed, up to rounding.
        assert relative(reused.numpy(), plain.numpy()) <= 1e-5
    assert torch.equal(call(sample, torch.full((2,), 7.0), *conditions), plain)
