"""A bundle in a diffusers pipeline: the picture of the pipeline's own U-Net, and refusals."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")

from blockcache.diffusers import PresetScheduler, attach, detach  # noqa: E402
from blockcache.export import CompileOptions, PresetOptions, compile_model  # noqa: E402
from blockcache.runtime import ConfigError, InputError, Session, UnsupportedModelError  # noqa: E402

STEPS = 6
PRESETS = ("dpm:6", "ddim:6", "euler:6", "dpm-karras:6", "dpm:6:every2", "unipc:6:every2",
           "euler:6:every2")  # fmt: skip
KINDS = ("sd", "sdxl")
NATIVE = ("unipc:6", "euler-a:6", "dpm-sde:6", "lcm:6")
THEIRS = ("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DEISMultistep",
          "DPMSolverSinglestep", "LMSDiscrete", "PNDM", "SASolver", "TCD", "DDPM")  # fmt: skip


@pytest.fixture(scope="module")
def bundles(compiled, tmp_path_factory):
    """The tiny bundles with presets of six steps; the export is the shared one."""
    made = {}
    for kind in KINDS:
        model, bundle = compiled(kind)
        folder = tmp_path_factory.mktemp("drop-in") / kind
        shutil.copytree(bundle.folder, folder)
        presets = [PresetOptions.parse(text) for text in (*PRESETS, *NATIVE)]
        presets += [
            PresetOptions(solver="scheduler", steps=6, scheduler=f"{name}Scheduler", name=name)
            for name in THEIRS
        ]
        made[kind] = compile_model(model, folder, CompileOptions(presets=tuple(presets))).bundle
    return made


@pytest.fixture(scope="module")
def pipelines(pipeline_folder):
    made = {}
    for kind in KINDS:
        made[kind] = diffusers.DiffusionPipeline.from_pretrained(pipeline_folder(kind))
        made[kind].set_progress_bar_config(disable=True)
    return made


def lent(pipeline):
    """A pipeline that gets its own parts back."""
    before = {"unet": pipeline.unet, "scheduler": pipeline.scheduler}
    yield pipeline
    pipeline.register_modules(**before)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def pipeline(kind, pipelines):
    yield from lent(pipelines[kind])


@pytest.fixture
def bundle(kind, bundles):
    return bundles[kind]


@pytest.fixture
def sd(pipelines):
    yield from lent(pipelines["sd"])


SIZE = 16  # of the latents


def call(pipeline, prompt="a red apple", **changes):
    """Final latents [N, C, H, W] of a run with the same noise every time."""
    size = SIZE * pipeline.vae_scale_factor
    options = {
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "generator": torch.Generator().manual_seed(3),
        "output_type": "latent",
        "height": size,
        "width": size,
    }
    images = pipeline(prompt, **{**options, **changes}).images
    return images.float().numpy()


def relative(a, b):
    return float(np.abs(a - b).max() / np.abs(b).max())


def both(pipeline, bundle, preset, draw, **options):
    """What the pipeline draws with its own U-Net and the preset's solver, and with the bundle."""
    attach(pipeline, bundle, preset=preset, **options)
    ours, scheduler = draw(), pipeline.scheduler
    detach(pipeline)
    pipeline.register_modules(scheduler=scheduler)
    return ours, draw()


# -- the pipeline's own picture --------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset",
    ["dpm-6", "ddim-6", "euler-6", "dpm-karras-6", "unipc-6", "euler-a-6", "dpm-sde-6", "lcm-6"],
)
def test_uncached_it_draws_what_the_pipelines_own_unet_draws(pipeline, bundle, preset):
    ours, theirs = both(pipeline, bundle, preset, lambda: call(pipeline))
    assert relative(ours, theirs) <= 1e-5


SCHEDULERS = {
    "dpm-6": ("DPMSolverMultistepScheduler", {}),
    "ddim-6": ("DDIMScheduler", {"clip_sample": False}),
    "euler-6": ("EulerDiscreteScheduler", {}),
    "dpm-karras-6": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc-6": ("UniPCMultistepScheduler", {}),
    "euler-a-6": ("EulerAncestralDiscreteScheduler", {}),
    "dpm-sde-6": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "lcm-6": ("LCMScheduler", {}),
}


@pytest.mark.parametrize("preset", SCHEDULERS)
def test_the_presets_scheduler_is_that_of_diffusers(sd, compiled, bundles, preset):
    """The same run with diffusers' own scheduler ends at the same latents."""
    attach(sd, bundles["sd"], preset=preset)
    ours = call(sd)
    detach(sd)
    name, options = SCHEDULERS[preset]
    training = compiled("sd")[0].scheduler
    sd.register_modules(scheduler=getattr(diffusers, name).from_config(training, **options))
    attach(sd, bundles["sd"], preset=preset, keep_scheduler=True)
    assert relative(call(sd), ours) <= 1e-5


@pytest.mark.parametrize("preset", ["dpm-6-every2", "unipc-6-every2", "euler-6-every2"])
def test_a_cached_preset_draws_what_denoise_draws(kind, pipeline, bundle, preset):
    unet = attach(pipeline, bundle, preset=preset)
    ours = call(pipeline)
    given = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    with torch.no_grad():
        prompt, negative, *pooled = pipeline.encode_prompt("a red apple", **given)
    both = {}
    if kind == "sdxl":
        size = SIZE * pipeline.vae_scale_factor
        ids = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32)
        halves = [{"text_embeds": embeds, "time_ids": ids} for embeds in pooled]
        both = dict(zip(("conditions", "negative_conditions"), halves, strict=True))
    noise = torch.randn((1, 4, SIZE, SIZE), generator=torch.Generator().manual_seed(3)).numpy()
    wanted = unet.session.denoise(noise, prompt, negative, guidance_scale=4.0, **both)
    assert relative(ours, wanted.latents) <= 1e-5
    assert wanted.record.computed_fraction < 1


def test_several_pictures_without_guidance_at_another_size(pipeline, bundle):
    height = 8 * pipeline.vae_scale_factor

    def draw():
        prompts = ["a red apple", "a blue car"]
        return call(pipeline, prompts, num_images_per_prompt=2, guidance_scale=1.0, height=height)

    ours, theirs = both(pipeline, bundle, "dpm-6", draw)
    assert ours.shape == (4, 4, 8, SIZE)
    assert relative(ours, theirs) <= 1e-5


def test_guidance_rescale_is_the_pipelines(pipeline, bundle):
    draw = lambda: call(pipeline, guidance_rescale=0.7)  # noqa: E731
    ours, theirs = both(pipeline, bundle, "dpm-6", draw)
    assert relative(ours, theirs) <= 1e-5


def switch_guidance_off(pipe, step, timestep, tensors):
    """diffusers' own recipe: the batch halves after the third step."""
    if step == 2:
        pipe._guidance_scale = 0.0
        for name in ("prompt_embeds", "add_text_embeds", "add_time_ids"):
            if name in tensors:
                tensors[name] = tensors[name].chunk(2)[-1]
    return tensors


def test_guidance_may_be_switched_off_midway(kind, pipeline, bundle):
    names = ["latents", "prompt_embeds"]
    names += ["add_text_embeds", "add_time_ids"] if kind == "sdxl" else []

    def draw():
        return call(
            pipeline,
            callback_on_step_end=switch_guidance_off,
            callback_on_step_end_tensor_inputs=names,
        )

    ours, theirs = both(pipeline, bundle, "dpm-6", draw)
    assert relative(ours, theirs) <= 1e-5


def test_callbacks_edit_latents(sd, bundles):
    def flip(pipe, step, timestep, tensors):
        return {"latents": -tensors["latents"]} if step == 1 else {}

    draw = lambda: call(sd, callback_on_step_end=flip)  # noqa: E731
    ours, theirs = both(sd, bundles["sd"], "dpm-6", draw)
    assert relative(ours, theirs) <= 1e-5
    assert relative(call(sd), theirs) > 0.1


def test_image_to_image_begins_at_a_later_step(kind, pipeline, bundle):
    names = {"sd": "StableDiffusionImg2ImgPipeline", "sdxl": "StableDiffusionXLImg2ImgPipeline"}
    image = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(8))
    components = dict(pipeline.components)
    more = {"requires_safety_checker": False} if kind == "sd" else {}
    other = getattr(diffusers, names[kind])(**components, **more)
    other.set_progress_bar_config(disable=True)

    def draw():
        images = other(
            "a red apple", image=image, strength=0.6, num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(3), output_type="latent",
        ).images  # fmt: skip
        return images.numpy()

    ours, theirs = both(other, bundle, "dpm-6", draw)
    assert relative(ours, theirs) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pipeline_in_16_bits(pipeline_folder, bundles, dtype):
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipeline_folder("sd"), torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    unet = attach(pipe, bundles["sd"], preset="dpm-6")
    assert unet.dtype == dtype
    drawn = call(pipe)
    assert np.isfinite(drawn).all()
    single = diffusers.DiffusionPipeline.from_pretrained(pipeline_folder("sd"))
    single.set_progress_bar_config(disable=True)
    attach(single, bundles["sd"], preset="dpm-6")
    assert relative(drawn, call(single)) < 0.1  # the noise itself is rounded to 8 or 11 bits


def test_an_interrupted_run_is_over(sd, bundles):
    """The next call begins anew, whatever the last one left."""
    attach(sd, bundles["sd"], preset="dpm-6-every2")
    wanted = call(sd)

    def stop(pipe, step, timestep, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(sd, callback_on_step_end=stop)
    assert np.array_equal(call(sd), wanted)


def test_detach_gives_the_pipeline_its_own_back(sd, bundles):
    before, own = (sd.unet, sd.scheduler), call(sd)
    unet = attach(sd, bundles["sd"], preset="dpm-6")
    assert isinstance(sd.scheduler, PresetScheduler)
    with pytest.raises(ConfigError, match="has a bundle already"):
        attach(sd, bundles["sd"])
    detach(sd)
    assert (sd.unet, sd.scheduler) == before
    assert np.array_equal(call(sd), own)
    with pytest.raises(ConfigError, match="this one is closed"):
        unet.session.begin(np.zeros((1, 7, 32), np.float32))
    with pytest.raises(ConfigError, match="with a bundle, its U-Net is a UNet2"):
        detach(sd)


@pytest.mark.parametrize("name", THEIRS)
def test_a_preset_may_run_a_scheduler_of_diffusers(pipeline, bundle, name):
    """Evaluation by evaluation, as many as the scheduler asks for; noise is the pipeline's."""
    ours, theirs = both(pipeline, bundle, name, lambda: call(pipeline))
    assert type(pipeline.scheduler).__name__ == f"{name}Scheduler"
    assert relative(ours, theirs) <= 1e-5


def test_denoise_refuses_a_scheduler_of_diffusers_by_name(bundles):
    with Session.open(bundles["sd"], preset="HeunDiscrete", backend="empty") as session:
        assert session.steps == len(session.timesteps) == 11
        session.warm_up()
        prompt = np.zeros((1, 7, 32), np.float32)
        with pytest.raises(ConfigError) as caught:
            session.denoise(session.noise([0]), prompt, prompt)
    assert str(caught.value) == (
        "Preset 'HeunDiscrete' runs HeunDiscreteScheduler of diffusers, which is not in the "
        "runtime: attach the bundle to a pipeline (blockcache.diffusers), or drive the scheduler "
        "yourself with begin, predict and end."
    )


def test_a_scheduler_that_diffusers_does_not_have_is_refused(sd, bundles):
    found = bundles["sd"].preset("HeunDiscrete")
    solver = {**found.solver, "scheduler": "NoScheduler"}
    other = replace(bundles["sd"], presets={"HeunDiscrete": replace(found, solver=solver)})
    with pytest.raises(ConfigError, match=r"runs NoScheduler, which diffusers .* does not have"):
        attach(sd, other, preset="HeunDiscrete")


OTHERS = (
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "SASolverScheduler",
)


@pytest.mark.parametrize("name", OTHERS)
def test_other_schedulers_of_the_same_timesteps_run(sd, compiled, bundles, name):
    """The solver is the pipeline's own; uncached, the picture is its own U-Net's."""
    scheduler = getattr(diffusers, name).from_config(compiled("sd")[0].scheduler)
    sd.register_modules(scheduler=scheduler)
    ours, theirs = both(sd, bundles["sd"], "dpm-6", lambda: call(sd), keep_scheduler=True)
    assert relative(ours, theirs) <= 1e-5


@pytest.mark.parametrize(
    ("scheduler", "preset", "told"),
    [
        ("PNDMScheduler", "dpm-6", "attach: dpm of preset 'dpm-6' runs in place of the "
         "pipeline's PNDMScheduler until detach. To run PNDMScheduler itself, compile --preset "
         "PNDMScheduler:6 and attach that."),
        ("LMSDiscreteScheduler", "PNDM", "attach: PNDMScheduler of preset 'PNDM' runs in place of"),
        ("PNDMScheduler", "PNDM", ""),
        ("DDIMScheduler", "dpm-6", ""),
    ],
)  # fmt: skip
def test_what_stands_for_another_scheduler_is_said(sd, bundles, caplog, scheduler, preset, told):
    """PNDM is what SD1.5 ships."""
    sd.register_modules(scheduler=getattr(diffusers, scheduler).from_config(sd.scheduler.config))
    attach(sd, bundles["sd"], preset=preset)
    said = [record.message for record in caplog.records if record.name == "blockcache"]
    assert len(said) == bool(told)
    assert all(message.startswith(told) for message in said)


def test_a_preset_that_chose_its_steps_takes_those_that_it_replaces(sd, bundles):
    """``dpm:20:x2`` may run 21 steps; whoever asks the pipeline for 20 means this preset."""
    bundle = bundles["sd"]
    found = bundle.preset("dpm-6")
    provenance = replace(found.provenance, replaced_steps=5)
    chosen = replace(bundle, presets={"dpm-6": replace(found, provenance=provenance)})
    attach(sd, chosen, preset="dpm-6")
    assert np.array_equal(call(sd, num_inference_steps=5), call(sd))
    with pytest.raises(InputError, match="expected 5, the steps of preset 'dpm-6', got 7"):
        call(sd, num_inference_steps=7)


# -- refused ---------------------------------------------------------------------------------------


def test_another_number_of_steps_is_refused(sd, bundles):
    attach(sd, bundles["sd"], preset="dpm-6")
    with pytest.raises(InputError) as caught:
        call(sd, num_inference_steps=7)
    assert str(caught.value) == (
        "num_inference_steps: expected 6, the steps of preset 'dpm-6', got 7. Pass "
        "num_inference_steps=6, or compile a preset of 7 steps and attach it."
    )


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "HeunDiscreteScheduler", "LCMScheduler"])
def test_other_timesteps_are_refused(sd, bundles, scheduler):
    sd.register_modules(scheduler=getattr(diffusers, scheduler).from_config(sd.scheduler.config))
    attach(sd, bundles["sd"], preset="dpm-6", keep_scheduler=True)
    with pytest.raises(
        InputError,
        match=f"^timesteps: expected the 6 of .*{scheduler} runs .*--preset {scheduler}:STEPS",
    ):
        call(sd)


ARGUMENTS = {
    "timestep_cond": r"guidance embeddings \(LCM\)",
    "attention_mask": "attention masks",
    "encoder_attention_mask": "attention masks of the prompt",
    "down_block_additional_residuals": "ControlNet residuals",
    "mid_block_additional_residual": "ControlNet residuals",
    "down_intrablock_additional_residuals": "T2I-Adapter residuals",
    "something_new": "something_new",
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_without_a_place_is_refused_by_name(sd, bundles, name):
    unet = attach(sd, bundles["sd"], preset="dpm-6")
    sd.scheduler.set_timesteps(STEPS)
    sample, prompt = torch.zeros((1, 4, SIZE, SIZE)), torch.zeros((1, 9, 32))
    with pytest.raises(UnsupportedModelError, match=f"^{ARGUMENTS[name]}: this bundle was compil"):
        unet(sample, sd.scheduler.timesteps[0], prompt, **{name: torch.zeros(1)})


def test_arguments_of_attention_are_refused(sd, bundles):
    unet = attach(sd, bundles["sd"], preset="dpm-6")
    sd.scheduler.set_timesteps(STEPS)
    sample, prompt = torch.zeros((1, 4, SIZE, SIZE)), torch.zeros((1, 9, 32))
    with pytest.raises(UnsupportedModelError, match=r"^cross_attention_kwargs: this bundle"):
        unet(sample, sd.scheduler.timesteps[0], prompt, cross_attention_kwargs={"scale": 0.5})


def test_image_prompts_are_refused(sd, bundles):
    unet = attach(sd, bundles["sd"], preset="dpm-6")
    sd.scheduler.set_timesteps(STEPS)
    sample, prompt = torch.zeros((1, 4, SIZE, SIZE)), torch.zeros((1, 9, 32))
    with pytest.raises(InputError, match=r"^image_embeds: this model takes the conditions"):
        unet(sample, sd.scheduler.timesteps[0], prompt, added_cond_kwargs={"image_embeds": prompt})


def test_a_lora_that_is_loaded_before_is_refused(sd, bundles, monkeypatch):
    monkeypatch.setattr(sd.unet, "_hf_peft_config_loaded", True, raising=False)
    with pytest.raises(UnsupportedModelError, match=r"^A LoRA is loaded in this pipeline's U-Net"):
        attach(sd, bundles["sd"], preset="dpm-6")


@pytest.mark.parametrize(
    ("method", "named"),
    [
        ("load_lora_adapter", "A LoRA"),
        ("load_attn_procs", "A LoRA"),
        ("_load_ip_adapter_weights", "An IP-Adapter"),
        ("enable_freeu", "FreeU"),
        ("set_attn_processor", "An attention processor"),
    ],
)
def test_what_would_change_the_unet_is_refused_by_name(sd, bundles, method, named):
    unet = attach(sd, bundles["sd"], preset="dpm-6")
    with pytest.raises(UnsupportedModelError, match=f"^{named} would have no effect: the bundle"):
        getattr(unet, method)(None)


def test_free_u_is_refused_through_the_pipeline(sd, bundles):
    attach(sd, bundles["sd"], preset="dpm-6")
    with pytest.raises(UnsupportedModelError, match=r"^FreeU would have no effect"):
        sd.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def test_a_pipeline_without_a_unet_is_refused(bundles):
    with pytest.raises(UnsupportedModelError, match="Expected a pipeline with a U-Net, object has"):
        attach(object(), bundles["sd"])
    with pytest.raises(ConfigError, match="Expected a pipeline with a bundle"):
        detach(object())


def test_another_models_bundle_is_refused(pipelines, bundles):
    with pytest.raises(UnsupportedModelError, match=r"this one has another .*addition_embed_type"):
        attach(pipelines["sd"], bundles["sdxl"])
