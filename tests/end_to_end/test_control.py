"""ControlNets compiled with a U-Net: exact, under one schedule, as in diffusers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("typer")

from PIL import Image  # noqa: E402

from blockcache.diffusers import attach, detach  # noqa: E402
from blockcache.export import (  # noqa: E402
    CompileOptions,
    ExportOptions,
    PresetOptions,
    compile_model,
    load_model,
    load_parts,
)
from blockcache.export.measure.calibration import Calibration  # noqa: E402
from blockcache.export.unet.cached_unet import CachedUNet, Denoiser  # noqa: E402
from blockcache.export.unet.model import BRANCH  # noqa: E402
from blockcache.export.unet.steps import TableSteps  # noqa: E402
from blockcache.runtime import (  # noqa: E402
    Alignment,
    InputError,
    Pipeline,
    Schedule,
    Session,
    UnsupportedModelError,
)
from blockcache.runtime.run_table import run_table  # noqa: E402
from blockcache.runtime.solvers.solver import SolverConfig, solver_tables  # noqa: E402

CUTS = (-1, 0, 1, 2)
PROMPT = "encoder_hidden_states"


@pytest.fixture(scope="module")
def controlled(tiny_models, pipeline_folder, tmp_path_factory):
    """``controlled(kind)``: a pipeline with ControlNets as a SourceModel, its bundle, itself.

    The U-Net may be cut everywhere.
    """
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = load_and_compile(kind, tiny_models(kind).controlnets)
        return made[kind]

    def load_and_compile(kind, nets):
        base, folders = pipeline_folder(kind), [tmp_path_factory.mktemp("net") for _ in nets]
        for net, folder in zip(nets, folders, strict=True):
            net.save_pretrained(folder)
        model = load_model(base, controlnets=folders)
        presets = tuple(map(PresetOptions.parse, ("ddim:4", "ddim:4:every2", "dpm:20")))
        options = CompileOptions(presets=presets, export=ExportOptions(outputs=2, cuts=CUTS))
        out = tmp_path_factory.mktemp(kind) / "bundle"
        bundle = compile_model(model, out, options, parts=load_parts(base)).bundle
        own = [diffusers.ControlNetModel.from_pretrained(folder) for folder in folders]
        if kind == "controlled":
            pipeline = diffusers.StableDiffusionControlNetPipeline.from_pretrained(
                base, controlnet=own[0], safety_checker=None
            )
        else:
            pipeline = diffusers.StableDiffusionXLControlNetPipeline.from_pretrained(
                base, controlnet=own, add_watermarker=False
            )
        pipeline.set_progress_bar_config(disable=True)
        return model.cut_at(CUTS), bundle, pipeline

    return get


@pytest.fixture(scope="module")
def two_nets(controlled):
    """SDXL's U-Net with two ControlNets, and its bundle."""
    return controlled("sdxl-controlled")[:2]


def relative(ours, reference):
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def others(conditions):
    return {name: values for name, values in conditions.items() if name != PROMPT}


def predicted(session, sample, conditions, step=1):
    """The model output at a step, everything computed."""
    batch, _, height, width = sample.shape
    with session.begin(
        conditions[PROMPT], conditions=others(conditions), batch=batch, height=height, width=width
    ) as request:
        return request.predict(step, sample)


def in_diffusers(model, sample, timestep, conditions, scales):
    """U-Net and ControlNets by the classes of diffusers, as their pipelines call them."""
    given_ = {name: torch.from_numpy(values) for name, values in conditions.items()}
    added = {name: given_[name] for name in ("text_embeds", "time_ids")}
    shared = {"encoder_hidden_states": given_[PROMPT], "added_cond_kwargs": added}
    with torch.no_grad():
        time = torch.tensor(float(timestep))
        down, middle = diffusers.MultiControlNetModel(model.controlnets)(
            torch.from_numpy(sample),
            time,
            controlnet_cond=[given_["control_image"], given_["control_image_2"]],
            conditioning_scale=list(scales),
            return_dict=False,
            **shared,
        )
        residuals = {
            "down_block_additional_residuals": down,
            "mid_block_additional_residual": middle,
        }
        output = model.unet(torch.from_numpy(sample), time, **shared, **residuals)
    return output.sample.numpy()


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 16, 16), (3, 10, 18)])
def test_segments_equal_diffusers_own_classes(two_nets, conditions_of, batch, height, width):
    model, bundle = two_nets
    session = Session.open(bundle, preset="ddim-4", verify=False)
    sample = session.noise(range(batch), height, width)
    conditions = conditions_of(model, batch, size=(height, width))
    conditions["control_scale_2"] = session.control_scale(1.25)
    time = session.timesteps[1]
    assert 200 <= time <= 800, "the first one's control acts between these"
    reference = in_diffusers(model, sample, time, conditions, (0.8, 1.25))
    assert relative(predicted(session, sample, conditions), reference) <= 1e-5
    plain = in_diffusers(model, sample, time, conditions, (0.0, 0.0))
    assert relative(plain, reference) > 0.05, "the control does something"


def test_a_scale_of_zero_is_no_control(two_nets, conditions_of):
    model, bundle = two_nets
    session = Session.open(bundle, preset="ddim-4", verify=False)
    sample, off = session.noise([0]), session.control_scale(0)
    conditions = {
        **conditions_of(model, 1),
        "control_scale": off,
        "control_scale_2": off,
    }
    ours = predicted(session, sample, conditions)
    blank = {name: np.zeros_like(v) for name, v in conditions.items() if "image" in name}
    np.testing.assert_array_equal(ours, predicted(session, sample, {**conditions, **blank}))
    given_ = {name: torch.from_numpy(values) for name, values in conditions.items()}
    added = {name: given_[name] for name in ("text_embeds", "time_ids")}
    time = torch.tensor(float(session.timesteps[1]))
    reference = model.unet(
        torch.from_numpy(sample), time, given_[PROMPT], added_cond_kwargs=added
    ).sample.numpy()
    assert relative(ours, reference) <= 1e-5


def random_preset(preset, seed):
    """A random schedule and random alignment on a preset's solver."""
    rng = np.random.default_rng(seed)
    steps, blocks = preset.schedule.recompute.shape
    recompute = rng.random((steps, blocks)) < rng.uniform(0.3, 0.9)
    recompute[0] = True
    tables = []
    for k, table in enumerate(preset.alignment.tables):
        made = 0.1 * rng.standard_normal(table.shape).astype(np.float32)
        made[:, 0] += 1.0
        made[recompute[:, k]] = Alignment.identity(1, (table.shape[2],), 2).tables[0][0]
        tables.append(made)
    return dataclasses.replace(
        preset, schedule=Schedule(recompute), alignment=Alignment(tuple(tables))
    )


@settings(max_examples=2, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from([(1, 10, 18), (3, 8, 10)]))
def test_the_loop_equals_the_reference_under_any_schedule(two_nets, conditions_of, seed, shape):
    model, bundle = two_nets
    images, *size = shape
    session = Session.open(bundle, preset="dpm-20", verify=False)
    preset = random_preset(session.preset, seed)
    session = Session(bundle, preset, session.backend)
    positive = conditions_of(model, images, seed=1, size=size)
    negative = conditions_of(model, 1, seed=2)
    negative = {PROMPT: negative[PROMPT]} | {
        name: negative[name] for name in ("text_embeds", "time_ids")
    }
    noise = session.noise(range(images), *size)
    ours = session.denoise(
        noise,
        positive[PROMPT],
        negative[PROMPT],
        conditions=others(positive),
        negative_conditions=others(negative),
        guidance_scale=3.0,
    )
    tables = solver_tables(SolverConfig.from_json(preset.solver))
    picked = Calibration(positive, negative).pick(range(images), guided=True)
    with CachedUNet(model, 2) as cached:
        denoiser = Denoiser(cached, TableSteps(tables), picked, 3.0)
        drawn = denoiser.denoise(torch.from_numpy(noise), preset.schedule, preset.alignment)
    assert relative(ours.latents, drawn.numpy()) <= 1e-4
    np.testing.assert_array_equal(ours.record.ran, run_table(ours.record.segments, preset.schedule))


def test_a_reused_branch_takes_the_controlnets_layers_along(two_nets):
    """What feeds only skips below the cut does not run, in the ControlNets as in the U-Net."""
    model, bundle = two_nets
    loop = [segment for segment in bundle.segments if segment.role in ("trunk", "block")]
    blocks = model.blocks
    assert [b.path for b in blocks if b.path.startswith("controlnet.1")] == [
        "controlnet.1.down_blocks.0.attentions.0",
        "controlnet.1.mid_block.attentions.0",
    ]
    for cut in CUTS:
        recompute = np.ones((2, len(blocks)), bool)
        recompute[1, [(b.kind, b.depth) for b in blocks].index((BRANCH, cut))] = False
        ran = {
            segment.block
            for segment, runs in zip(loop, run_table(loop, Schedule(recompute))[1], strict=True)
            if runs and segment.block is not None
        }
        plain = {k for k, block in enumerate(blocks) if block.kind != BRANCH}
        assert ran == {k for k in plain if blocks[k].depth <= cut}


def test_pictures_and_scales_are_checked_by_name(two_nets, conditions_of):
    model, bundle = two_nets
    session = Session.open(bundle, preset="ddim-4", verify=False)
    conditions = conditions_of(model, 1)
    sample = session.noise([0])
    with pytest.raises(InputError, match=r"control_image_2: expected shape \[1, 3, 64, 64\]"):
        predicted(session, sample, {**conditions, "control_image_2": sample})
    lacking = {name: v for name, v in conditions.items() if name != "control_image"}
    with pytest.raises(InputError, match="control_image: this model needs it in conditions"):
        predicted(session, sample, lacking)
    with pytest.raises(InputError, match=r"control_scale: expected shape \[1, 3\]"):
        predicted(session, sample, {**conditions, "control_scale": np.float32([[1]])})


# -- prompt to picture, and in a pipeline of diffusers ---------------------------------------------

PROMPTS = ["a fox", "an owl"]
SHARES = {
    "controlnet_conditioning_scale": 0.7,
    "control_guidance_start": 0.25,
    "control_guidance_end": 0.75,
}
SHARES_OF_TWO = {
    "controlnet_conditioning_scale": [0.7, 1.2],
    "control_guidance_start": [0.25, 0.0],
    "control_guidance_end": [0.75, 0.5],
}


@pytest.fixture(scope="module")
def drawing(controlled):
    """A bundle with one ControlNet, and diffusers' pipeline of the same."""
    return controlled("controlled")[1:]


def picture(seed=0):
    """uint8 [H, W, 3]; latents are 16 x 24."""
    return np.random.default_rng(seed).integers(0, 256, (64, 96, 3), np.uint8)


def in_pipeline(pipeline, noise, guidance_scale=4.0, **options):
    """Final latents of diffusers' pipeline; of two ControlNets each has a picture of its own."""
    nets = len(getattr(pipeline.controlnet, "nets", [None]))
    images = [torch.from_numpy(picture(k))[None].permute(0, 3, 1, 2) / 255 for k in range(nets)]
    drawn = pipeline(
        PROMPTS, image=images if nets > 1 else images[0], num_inference_steps=4,
        guidance_scale=guidance_scale, latents=torch.from_numpy(noise), output_type="latent",
        **{**(SHARES_OF_TWO if nets > 1 else SHARES), **options},
    )  # fmt: skip
    return drawn.images.numpy()


def test_prompts_and_a_control_picture_become_the_latents_of_diffusers(drawing):
    bundle, own = drawing
    with Pipeline.open(bundle, preset="ddim-4", verify=False) as pipeline:
        drawn = pipeline(
            PROMPTS, seeds=[0, 1], guidance_scale=4.0, control_image=picture(), **SHARES
        )
        assert drawn.images.shape == (2, 64, 96, 3), "as large as the control picture"
        noise = pipeline.session.noise([0, 1], 16, 24)
        wanted = in_pipeline(own, noise)
        assert relative(drawn.latents, wanted) <= 1e-4
        assert relative(in_pipeline(own, noise, controlnet_conditioning_scale=0.0), wanted) > 0.01
        assert relative(in_pipeline(own, noise, control_guidance_start=0.0), wanted) > 1e-3
        plain = pipeline(
            PROMPTS, seeds=[0, 1], guidance_scale=4.0, control_image=picture(1),
            controlnet_conditioning_scale=0.0,
        )  # fmt: skip
        assert (
            relative(plain.latents, in_pipeline(own, noise, controlnet_conditioning_scale=0.0))
            <= 1e-4
        )


def test_two_controlnets_of_sdxl_draw_what_diffusers_draws(controlled):
    """Each with a picture, a scale and a share of the steps of its own."""
    _, bundle, own = controlled("sdxl-controlled")
    nets = own.controlnet
    with Pipeline.open(bundle, preset="ddim-4", verify=False) as pipeline:
        pictures = [picture(0), picture(1)]
        drawn = pipeline(
            PROMPTS, seeds=[0, 1], guidance_scale=4.0, control_image=pictures, **SHARES_OF_TWO
        )
        noise = pipeline.session.noise([0, 1], 16, 24)
    wanted = in_pipeline(own, noise)
    assert relative(drawn.latents, wanted) <= 1e-4
    for off in ([0.0, 1.2], [0.7, 0.0]):
        other = in_pipeline(own, noise, controlnet_conditioning_scale=off)
        assert relative(other, wanted) > 0.01, "both act"
    attach(own, bundle, preset="ddim-4")
    assert relative(in_pipeline(own, noise), wanted) <= 1e-4
    detach(own)
    assert own.controlnet is nets


def test_the_command_line_draws_with_each_controlnets_file(controlled, blockcache, tmp_path):
    _, bundle, _ = controlled("sdxl-controlled")
    options = ["--prompt", "a fox", "--preset", "ddim:4", "--guidance", 4]
    for net in range(2):
        Image.fromarray(picture(net)).save(tmp_path / f"{net}.png")
        options += ["--control-image", tmp_path / f"{net}.png"]
        options += ["--control-scale", SHARES_OF_TWO["controlnet_conditioning_scale"][net]]
        options += ["--control-start", SHARES_OF_TWO["control_guidance_start"][net]]
    code, _, err = blockcache(
        "run", bundle.folder, *options, "--control-end", 0.75, "--out", tmp_path / "drawn.npy"
    )
    assert code == 0, err
    with Pipeline.open(bundle, preset="ddim-4", verify=False) as pipeline:
        wanted = pipeline(
            "a fox", seeds=[0], guidance_scale=4.0, control_image=[picture(0), picture(1)],
            **{**SHARES_OF_TWO, "control_guidance_end": 0.75},
        )  # fmt: skip
    assert relative(np.load(tmp_path / "drawn.npy"), wanted.latents) <= 1e-6
    code, _, err = blockcache("run", bundle.folder, *options[:2], "--out", tmp_path / "drawn.npy")
    assert code == 1
    assert "control_image: expected pictures for each of the 2 ControlNets" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "control_image: expected pictures for each of the 1 ControlNets"),
        ({"control_image": np.zeros((64, 64))}, r"control_image: expected uint8 \[N, H, W, 3\]"),
        ({"control_image": [picture()] * 3}, "Expected one of each or as many"),
        (
            {"control_image": picture(), "controlnet_conditioning_scale": [1.0, 2.0]},
            "controlnet_conditioning_scale: expected one number, or 1 of them, got 2",
        ),
        (
            {"control_image": picture(), "height": 128},
            "height: expected 64, by the size",
        ),
    ],
)
def test_wrong_control_is_refused_by_name(drawing, options, message):
    with (
        Pipeline.open(drawing[0], preset="ddim-4", verify=False) as pipeline,
        pytest.raises(InputError, match=message),
    ):
        pipeline(PROMPTS, **options)


def test_attached_the_bundles_controlnet_stands_for_the_pipelines(drawing):
    bundle, pipeline = drawing
    noise = np.random.default_rng(0).standard_normal((2, 4, 16, 24)).astype(np.float32)
    own, net = in_pipeline(pipeline, noise), pipeline.controlnet
    attach(pipeline, bundle, preset="ddim-4")
    assert relative(in_pipeline(pipeline, noise), own) <= 1e-4
    with pytest.raises(UnsupportedModelError, match="guess_mode: a bundle's ControlNets act on"):
        in_pipeline(pipeline, noise, guess_mode=True)
    detach(pipeline)
    assert pipeline.controlnet is net
    attach(pipeline, bundle, preset="ddim-4-every2")
    cached = in_pipeline(pipeline, noise, control_guidance_start=0.0, control_guidance_end=1.0)
    detach(pipeline)
    with Pipeline.open(bundle, preset="ddim-4-every2", verify=False) as ours:
        states = ours.encode_prompt(PROMPTS), ours.encode_prompt("")
        wanted = ours.session.denoise(
            noise,
            *states,
            conditions={
                "control_image": picture()[None].transpose(0, 3, 1, 2).astype(np.float32) / 255,
                "control_scale": ours.session.control_scale(0.7),
            },
            guidance_scale=4.0,
        ).latents
    assert relative(cached, wanted) <= 1e-5


def test_other_controlnets_than_the_bundles_are_refused(drawing, pipeline_folder):
    bundle, pipeline = drawing
    plain = diffusers.StableDiffusionPipeline.from_pretrained(
        pipeline_folder("controlled"), safety_checker=None
    )
    with pytest.raises(
        UnsupportedModelError, match=r"Expected a pipeline with 1 ControlNets, .* 0"
    ):
        attach(plain, bundle, preset="ddim-4")
    two = diffusers.MultiControlNetModel([pipeline.controlnet] * 2)
    own = pipeline.controlnet
    pipeline.register_modules(controlnet=two)
    with pytest.raises(
        UnsupportedModelError, match=r"got one with 2\. Compile the model with them"
    ):
        attach(pipeline, bundle, preset="ddim-4")
    pipeline.register_modules(controlnet=own)
