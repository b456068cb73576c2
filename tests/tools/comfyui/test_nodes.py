"""The ComfyUI node on a stand-in of ComfyUI: what ``denoise`` draws, and refusals."""

from __future__ import annotations

import itertools
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from blockcache.export import CompileOptions, PresetOptions, compile_model  # noqa: E402
from blockcache.runtime import (  # noqa: E402
    ConfigError,
    InputError,
    Session,
    UnknownPresetError,
    UnsupportedModelError,
)

STEPS = 6
NATIVE = ("dpm", "unipc", "ddim-linspace", "euler", "euler-a", "dpm-sde", "lcm")
PRESETS = (*(f"{solver}:{STEPS}" for solver in NATIVE), "dpm:6:every2", "unipc:6:every2")
SIZE, SEED, IMAGES = 16, 5, 2
SIZES = ("height", "width", "crop_h", "crop_w", "target_height", "target_width")


@pytest.fixture(scope="module")
def loaded(comfy, compiled):
    """``loaded(kind, preset)``: what the node gives for a tiny bundle, and its session."""
    for kind in ("sd", "sdxl"):
        model, bundle = compiled(kind)
        shutil.copytree(bundle.folder, comfy.models / kind)
        if kind == "sd":
            presets = [PresetOptions.parse(text) for text in PRESETS]
            presets += [PresetOptions(solver="scheduler", steps=4, name="theirs")]
            compile_model(model, comfy.models / kind, CompileOptions(presets=tuple(presets)))

    def load(kind="sd", preset="dpm-6"):
        patcher, sampler, sigmas = comfy.node.load(kind, preset)
        return SimpleNamespace(
            patcher=patcher, sampler=sampler, sigmas=sigmas, bundle=patcher.model.diffusion_model
        )

    return load


def drawn(comfy, made, **changes):
    """A sampling with the same noise and prompts every time."""
    generator = torch.Generator().manual_seed(SEED)
    positive, negative = (torch.randn((1, 7, 32), generator=generator) for _ in range(2))
    noise = torch.randn((IMAGES, 4, SIZE, SIZE), generator=generator)
    given = {
        "patcher": made.patcher, "noise": noise, "cfg": 4.0, "sampler": made.sampler,
        "sigmas": made.sigmas, "positive": positive, "negative": negative, "seed": SEED,
    }  # fmt: skip
    return comfy.sample(**{**given, **changes}), noise, positive, negative


def denoised(comfy, kind, preset, noise, positive, negative, **more):
    """What the session draws from the noise as ComfyUI scales it."""
    with Session.open(comfy.models / kind, preset=preset) as session:
        scale = 1.0
        if preset.startswith("euler"):
            scale = np.sqrt(1 + session.sigmas[0] ** 2) / session._tables.initial_scale
        return session.denoise(
            (noise.numpy() * scale).astype(np.float32), positive.numpy(), negative.numpy(),
            guidance_scale=4.0, seeds=range(SEED, SEED + IMAGES), **more,
        )  # fmt: skip


def relative(a, b):
    return float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())


# -- what denoise draws ----------------------------------------------------------------------------


@pytest.mark.parametrize("text", PRESETS)
def test_a_preset_draws_what_denoise_draws(comfy, loaded, text):
    preset = text.replace(":", "-")
    ours, noise, positive, negative = drawn(comfy, loaded(preset=preset))
    wanted = denoised(comfy, "sd", preset, noise, positive, negative)
    ends = loaded(preset=preset).bundle.sigmas[-1]  # denoise holds α x, and DDIM ends at a level
    assert relative(ours / np.sqrt(1 + ends**2), wanted.latents) <= 1e-5
    assert (wanted.record.computed_fraction < 1) == ("every2" in text)


def test_sizes_and_pooled_prompts_reach_the_model(comfy, loaded, conditions_of, compiled):
    told = conditions_of(compiled("sdxl")[0], 1, seed=3)
    sizes = dict(zip(SIZES, (1366.0, 1000.0, 7.0, 3.0, 1201.0, 900.0), strict=True))
    prompt = torch.from_numpy(told["encoder_hidden_states"])
    pooled = torch.from_numpy(told["text_embeds"])
    ours, noise, *_ = drawn(
        comfy, loaded("sdxl", "dpm-20"), positive=prompt, negative=-prompt, pooled_output=pooled,
        **sizes,
    )  # fmt: skip
    ids = np.array([[*sizes.values()]], np.float32)
    more = {"text_embeds": told["text_embeds"], "time_ids": ids}
    wanted = denoised(
        comfy, "sdxl", "dpm-20", noise, prompt, -prompt, conditions=more, negative_conditions=more
    )
    assert relative(ours, wanted.latents) <= 1e-5


def solver_2m(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """DPM-Solver++ 2M as k-diffusion has it, on x = x0 + sigma * noise."""
    before, last = None, None
    for i, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        x0 = model(x, sigma * x.new_ones([len(x)]), **extra_args)
        length = torch.log(sigma / following)
        mean = x0 if before is None or following == 0 else x0 + (x0 - before) * length / last / 2
        x = x * following / sigma + (1 - following / sigma) * mean
        before, last = x0, length
        assert i < STEPS
    return x


@pytest.mark.parametrize("preset", ["dpm-6", "dpm-6-every2"])
def test_a_sampler_of_comfyui_may_run_the_presets_sigmas(comfy, loaded, preset):
    made = loaded(preset=preset)
    theirs = drawn(comfy, made, sampler=comfy.KSAMPLER(solver_2m))[0]
    assert relative(theirs, drawn(comfy, made)[0].numpy()) <= 1e-5


def test_guided_halves_may_come_apart(comfy, loaded):
    """Each has cached outputs of its own; engines are shared, sessions are used again."""
    made = loaded(preset="dpm-6-every2")
    together, apart = (drawn(comfy, made, apart=apart)[0] for apart in (False, True))
    assert relative(apart, together.numpy()) <= 1e-5
    assert len(made.bundle._idle) == 2
    assert np.array_equal(drawn(comfy, made, apart=True)[0], apart)
    assert len(made.bundle._idle) == 2


def test_without_guidance_one_half_runs(comfy, loaded):
    made = loaded()
    ours, noise, positive, _ = drawn(comfy, made, cfg=1)
    with Session.open(comfy.models / "sd", preset="dpm-6") as session:
        wanted = session.denoise(noise.numpy(), positive.numpy(), guidance_scale=1.0)
    assert relative(ours, wanted.latents) <= 1e-5


def test_a_later_part_of_the_sigmas_is_image_to_image(comfy, loaded):
    made, image = loaded(preset="dpm-6-every2"), torch.randn((IMAGES, 4, SIZE, SIZE))
    ours, noise, positive, negative = drawn(comfy, made, sigmas=made.sigmas[3:], latent=image)
    wanted = denoised(
        comfy, "sd", "dpm-6-every2", noise, positive, negative,
        image_latents=image.numpy(), start_step=3,
    )  # fmt: skip
    assert relative(ours, wanted.latents) <= 1e-5


def test_an_interrupted_sampling_is_over(comfy, loaded):
    made = loaded(preset="dpm-6-every2")
    wanted = drawn(comfy, made)[0]

    def interrupted(model, x, sigmas, extra_args=None, callback=None, disable=None):
        model(x, sigmas[0] * x.new_ones([len(x)]), **extra_args)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drawn(comfy, made, sampler=comfy.KSAMPLER(interrupted))
    assert np.array_equal(drawn(comfy, made)[0], wanted)


# -- the node --------------------------------------------------------------------------------------


def test_the_node_is_what_comfyui_looks_for(comfy, loaded):
    choices, text = comfy.node.INPUT_TYPES()["required"].values()
    assert choices == (["sd", "sdxl"],)
    assert text[0] == "STRING"
    assert len(comfy.node.load("sd", "")) == len(comfy.node.RETURN_TYPES) == 3
    assert hasattr(comfy.node, comfy.node.FUNCTION)
    made = loaded()
    assert (made.sigmas.dtype, made.sigmas.shape) == (torch.float32, (STEPS + 1,))
    assert made.patcher.model.memory_required([2, 4, 8, 8]) == 0


def test_a_bundle_that_was_compiled_again_is_loaded_again(comfy, loaded):
    manifest = comfy.models / "sd" / "manifest.json"
    before = comfy.node.IS_CHANGED("sd", "")
    os.utime(manifest, ns=(1, 1))
    assert comfy.node.IS_CHANGED("sd", "") != before


def test_what_is_not_there_is_refused(comfy, loaded):
    with pytest.raises(FileNotFoundError, match=r"^Expected a bundle of .*'sdxl'. in .*got 'none'"):
        comfy.node.load("none", "")
    with pytest.raises(UnknownPresetError, match="Expected a preset of"):
        comfy.node.load("sd", "none")
    with pytest.raises(ConfigError, match="runs DDIMScheduler of diffusers, which is not in"):
        comfy.node.load("sd", "theirs")


@pytest.mark.parametrize(
    ("sizes", "more", "family"),
    [(0, (), ("SD15", "BaseModel")), (6, (), ("SDXL",) * 2), (5, (), ("SDXLRefiner",) * 2),
     (4, (), None), (0, ("class_labels",), None)],
)  # fmt: skip
def test_a_model_is_told_by_its_conditions(comfy, loaded, sizes, more, family):
    names = ["encoder_hidden_states", *(["text_embeds", "time_ids"] if sizes else []), *more]
    facts = SimpleNamespace(conditions=[SimpleNamespace(name=name) for name in names])
    given = SimpleNamespace(micro_conditions=sizes), SimpleNamespace(model=facts, folder="it")
    if family is not None:
        assert comfy.nodes._family(*given) == family
        return
    with pytest.raises(
        UnsupportedModelError, match=r"^Expected a U-Net of .* it takes .'encoder_h"
    ):
        comfy.nodes._family(*given)


# -- refused ---------------------------------------------------------------------------------------


def test_other_sigmas_are_refused_before_anything_runs(comfy, loaded):
    made = loaded()
    with pytest.raises(InputError) as caught:
        drawn(comfy, made, sigmas=torch.linspace(14, 0, 7))
    assert str(caught.value) == (
        f"sigmas: expected the 7 of preset 'dpm-6' ({made.sigmas[0]:.4g}, {made.sigmas[1]:.4g}, "
        f"{made.sigmas[2]:.4g}, ..., 0) or a part of them, got 7 (14, 11.67, 9.333, ..., 0). "
        f"Connect the SIGMAS of this loader to SamplerCustom, or name a scheduler and a number of "
        f"steps that visit these levels."
    )
    for wrong in (made.sigmas[[0, 2, 3]], torch.cat([made.sigmas, made.sigmas])):
        with pytest.raises(InputError, match=r"^sigmas: expected the 7 of"):
            made.bundle.check(wrong)


def evaluates_at(*places):
    """A sampler that evaluates at these places in the sigmas; between them for halves."""

    def sampler(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for place in places:
            sigma = (sigmas[int(place)] * sigmas[int(place + 0.5)]).sqrt()
            model(x, sigma * x.new_ones([len(x)]), **extra_args)
        return x

    return sampler


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ((0, 1, 1), r"^step: expected 2, which follows step 1, got 1\. The sampler evaluates the"),
        ((0, 0.5), r"^sigma: expected one of preset 'dpm-6' .*evaluates the model between its st"),
    ],
)
def test_a_sampler_that_evaluates_twice_a_step_is_refused(comfy, loaded, places, message):
    with pytest.raises(InputError, match=message):
        drawn(comfy, loaded(), sampler=comfy.KSAMPLER(evaluates_at(*places)))


def test_a_step_that_is_left_out_recomputes_everything(comfy, loaded):
    """Prompts of a later range of steps come in batches that are new there, or were away."""
    drawn(comfy, loaded(), sampler=comfy.KSAMPLER(evaluates_at(0, 3, 4)))


@pytest.mark.parametrize("method", ["add_patches", "add_hook_patches"])
def test_patches_of_weights_are_refused(loaded, method):
    with pytest.raises(UnsupportedModelError, match=r"^A LoRA or another patch of weights would"):
        getattr(loaded().patcher.clone(), method)({}, 1.0)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"patches": {"output_block_patch": [print]}}, r"patches of the U-Net \(output_block_pa"),
        ({"patches_replace": {"attn2": {("input", 1): print}}}, r"patches of the U-Net \(attn2\)"),
    ],
)
def test_patches_of_the_unet_are_refused_by_name(comfy, loaded, options, named):
    made = loaded()
    made.patcher = made.patcher.clone()
    made.patcher.model_options["transformer_options"].update(options)
    with pytest.raises(UnsupportedModelError, match=f"leaves the U-Net as it was.* got {named}"):
        drawn(comfy, made)


def test_wrappers_of_the_unet_are_refused_by_name(comfy, loaded):
    made = loaded()
    made.patcher = made.patcher.clone()
    made.patcher.add_wrapper_with_key(comfy.WrappersMP.DIFFUSION_MODEL, "easycache", print)
    with pytest.raises(UnsupportedModelError, match=r"got wrappers of the U-Net \(easycache\)"):
        drawn(comfy, made)


def test_a_controlnet_and_unknown_arguments_are_refused(comfy, loaded):
    with pytest.raises(UnsupportedModelError, match="got a ControlNet"):
        drawn(comfy, loaded(), control={"output": [None]})
    with pytest.raises(UnsupportedModelError, match="got time_context"):
        drawn(comfy, loaded(), time_context=torch.zeros(1))
    drawn(comfy, loaded(), crossattn_controlnet=torch.zeros(1))
