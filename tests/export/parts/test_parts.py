"""The parts beside the U-Net: what is found, what is refused, what a compile makes of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("onnxruntime")

from blockcache.export import CompileOptions, PresetOptions, compile_model, load_model  # noqa: E402
from blockcache.export.parts.load import load_parts  # noqa: E402
from blockcache.export.parts.part import Parts  # noqa: E402
from blockcache.export.parts.to_onnx import export_part  # noqa: E402
from blockcache.runtime import Bundle, BundleFormatError, ConfigError  # noqa: E402
from blockcache.runtime.bundles.checks import check_pipeline  # noqa: E402
from blockcache.runtime.bundles.manifest import Manifest  # noqa: E402
from blockcache.runtime.plan import Dim, Sizes  # noqa: E402

SIZES = Sizes(batch=1, height=16, width=16, tokens=9)
OPTIONS = CompileOptions(presets=(PresetOptions.parse("ddim:1"),))


@pytest.fixture
def folder(pipeline_folder, tmp_path):
    return shutil.copytree(pipeline_folder("sd"), tmp_path / "model")


def edit(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize(
    ("kind", "names", "zeros"),
    [
        ("sd", ("text_encoder", "decoder", "encoder"), False),
        ("sdxl", ("text_encoder", "text_encoder_2", "decoder", "encoder"), True),
        ("sdxl-encodes-empty", ("text_encoder", "text_encoder_2", "decoder", "encoder"), False),
        ("refiner", ("text_encoder_2", "decoder", "encoder"), True),
    ],
)
def test_what_a_pipeline_has(pipeline_folder, kind, names, zeros):
    parts = load_parts(pipeline_folder(kind))
    assert parts.names == names
    assert parts.zeros_without_negative is zeros
    assert parts.refused == {}


def test_an_upscaler_tells_its_noise_levels_and_scales_as_its_pipeline_does(
    pipeline_folder, tmp_path
):
    """The pipeline does not believe the config of its VAE."""
    folder = shutil.copytree(pipeline_folder("upscale"), tmp_path / "upscale")
    config = json.loads((folder / "vae" / "config.json").read_text())
    edit(folder / "vae" / "config.json", scaling_factor=0.5)
    parts = load_parts(folder)
    scheduler = diffusers.DDPMScheduler.from_pretrained(folder / "low_res_scheduler")
    assert parts.noise_levels == tuple(scheduler.alphas_cumprod[:351].tolist())
    decoder = parts.parts[-2].load(torch.float32)
    assert decoder.factor == 0.08333 == pytest.approx(config["scaling_factor"])
    edit(folder / "model_index.json", max_noise_level=4)
    assert len(load_parts(folder).noise_levels) == 5
    assert load_parts(pipeline_folder("sd")).noise_levels == ()


def test_a_manifest_has_noise_levels_where_there_are_any(pipeline_bundle):
    manifest = pipeline_bundle("sd").manifest
    assert "noise_levels" not in manifest.to_json()
    upscales = replace(manifest, pipeline=replace(manifest.pipeline, noise_levels=(1.0, 0.25)))
    assert Manifest.from_json(upscales.to_json().encode()).pipeline == upscales.pipeline
    wrong = replace(manifest, pipeline=replace(manifest.pipeline, noise_levels=(1.5,)))
    with pytest.raises(BundleFormatError, match=r"a number from 0 to 1 for 'pipeline\.noise_lev"):
        Manifest.from_json(wrong.to_json().encode())


def test_what_is_not_exported_is_named(folder):
    edit(folder / "model_index.json", vae=["diffusers", "AutoencoderOobleck"])
    parts = load_parts(folder)
    assert parts.names == ("text_encoder",)
    assert parts.refused == {
        "vae": "Expected a AutoencoderKL or AutoencoderTiny, got a AutoencoderOobleck, which is "
        "not exported."
    }


def test_without_one_text_encoder_there_is_none(pipeline_folder, tmp_path):
    folder = shutil.copytree(pipeline_folder("sdxl"), tmp_path / "model")
    edit(folder / "model_index.json", text_encoder_2=["transformers", "T5EncoderModel"])
    parts = load_parts(folder)
    assert parts.names == ("decoder", "encoder")
    assert "got a T5EncoderModel" in parts.refused["text_encoder_2"]


def test_a_bare_u_net_has_no_parts(folder):
    assert load_parts(folder / "unet").names == load_parts(folder).names  # inside its pipeline
    (folder / "model_index.json").unlink()
    assert load_parts(folder) == Parts(parts=())


def test_a_tiny_autoencoder_is_exported_exactly(folder, tmp_path):
    diffusers, ort = pytest.importorskip("diffusers"), pytest.importorskip("onnxruntime")
    sides = {f"{half}_block_out_channels": (8, 8, 8) for half in ("encoder", "decoder")}
    blocks = {f"num_{half}_blocks": (1, 1, 1) for half in ("encoder", "decoder")}
    vae = diffusers.AutoencoderTiny(**sides, **blocks)
    shutil.rmtree(folder / "vae")
    vae.save_pretrained(folder / "vae")
    edit(folder / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    _, decoder, _ = load_parts(folder).parts
    made = export_part(decoder, tmp_path, "float32", SIZES)
    latents = torch.randn(made.inputs[0].shape(replace(SIZES, batch=3, height=12, width=6)))
    (image,) = ort.InferenceSession(tmp_path / made.file).run(None, {"latents": latents.numpy()})
    with torch.no_grad():
        wanted = (vae.decode(latents, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(torch.from_numpy(image), wanted, atol=1e-6, rtol=0)


def test_clip_skip_of_more_layers_than_there_are_is_refused_by_name(folder):
    assert (
        "Expected a clip_skip of 1 to 1" in load_parts(folder, clip_skip=5).refused["text_encoder"]
    )


def test_equal_models_give_equal_bytes(folder, tmp_path):
    part, loaded = load_parts(folder).parts[0], []
    part = replace(
        part, load=lambda dtype, load=part.load: loaded.append(load(dtype)) or loaded[-1]
    )
    made = []
    for name in ("once", "again"):
        (tmp_path / name).mkdir()
        export_part(part, tmp_path / name, "float32", SIZES)
        made.append({p.name: p.read_bytes() for p in sorted((tmp_path / name).iterdir())})
    assert made[0] == made[1]
    assert sorted(made[0]) == ["text_encoder.bin", "text_encoder.onnx"]
    sizes = [weights.numel() for module in loaded for weights in module.parameters()]
    assert set(sizes) == {0}, "weights go with the export, whoever still refers to them"


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_keeps_pictures_and_what_overflows_in_float32(folder, tmp_path, precision):
    text, decoder, _ = load_parts(folder).parts
    made = export_part(text, tmp_path, precision, SIZES)
    assert made.outputs[0].dtype == precision
    weights = (tmp_path / "text_encoder.bin").stat().st_size
    assert weights < 0.6 * (folder / "text_encoder/model.safetensors").stat().st_size
    assert decoder.single, "an AutoencoderKL's config says force_upcast, or nothing"
    made = export_part(decoder, tmp_path, precision, SIZES)
    assert [spec.dtype for spec in (*made.inputs, *made.outputs)] == ["float32", "float32"]
    both_halves = (folder / "vae/diffusion_pytorch_model.safetensors").stat().st_size
    share = (tmp_path / "decoder.bin").stat().st_size / both_halves
    assert (share < 0.4) == (precision == "bfloat16"), share


def test_a_later_compile_keeps_the_parts_or_drops_them(folder, tmp_path):
    model, parts = load_model(folder), load_parts(folder)
    few = Parts(parts=tuple(part for part in parts.parts if part.role == "text_encoder"),
                refused={"vae": "It is too large."})  # fmt: skip
    with pytest.warns(UserWarning, match="The bundle gets no vae. It is too large."):
        made = compile_model(model, tmp_path / "bundle", OPTIONS, parts=few).bundle
    assert [part.name for part in made.manifest.parts] == ["text_encoder"]
    more = CompileOptions(presets=(PresetOptions.parse("ddim:2"),))
    kept = compile_model(model, tmp_path / "bundle", more).bundle
    assert kept.pipeline == made.pipeline
    assert kept.tokenizers == made.tokenizers
    Bundle.open(tmp_path / "bundle")
    none = compile_model(model, tmp_path / "bundle", more, parts=Parts(parts=())).bundle
    assert none.pipeline is None
    assert not list((tmp_path / "bundle").glob("parts/*/decoder.*"))


# -- what opens is right ---------------------------------------------------------------------------


def dims(*entries):
    return tuple(Dim.parse(entry) for entry in entries)


def changed(facts, name, side, index, **changes):
    """The facts with another tensor on one side of one part."""
    parts = []
    for part in facts.parts:
        if part.name == name:
            specs = list(getattr(part, side))
            specs[index] = replace(specs[index], **changes)
            part = replace(part, **{side: tuple(specs)})
        parts.append(part)
    return replace(facts, parts=tuple(parts))


WRONG = {
    "a part twice": (
        lambda f: replace(f, parts=(*f.parts, f.parts[0])), "expected each once"),
    "two decoders": (
        lambda f: replace(f, parts=(*f.parts, replace(f.parts[1], name="d", file="parts/d"))),
        "at most one part of role 'decoder'"),
    "no tokenizer": (lambda f: replace(f, tokenizers={}), "one for each of ['text_encoder']"),
    "a tokenizer of nothing": (
        lambda f: replace(f, tokenizers={**f.tokenizers, "x": "y"}), "one for each of"),
    "numbers that are not whole": (
        lambda f: changed(f, "text_encoder", "inputs", 0, dtype="float32"),
        "token numbers [batch, tokens]"),
    "states of other tokens": (
        lambda f: changed(f, "text_encoder", "outputs", 0, dims=dims("batch", 8, 32)),
        "states float32 [batch, 9, D]"),
    "states of another width": (
        lambda f: changed(f, "text_encoder", "outputs", 0, dims=dims("batch", 9, 16)),
        "states of 32 numbers a token"),
    "states in half precision": (
        lambda f: changed(f, "text_encoder", "outputs", 0, dtype="float16"),
        "states float32 [batch, 9, D]"),
    "latents of other channels": (
        lambda f: changed(f, "decoder", "inputs", 0, dims=dims("batch", 8, "height", "width")),
        "latents float32 [batch, 4, height, width] to image"),
    "a picture that is turned": (
        lambda f: changed(f, "decoder", "outputs", 0, dims=dims("batch", 3, "4*width", "4*height")),
        "latents float32 [batch, 4, height, width] to image"),
    "an encoder of gray pictures": (
        lambda f: changed(f, "encoder", "inputs", 0, dims=dims("batch", 1, "4*height", "4*width")),
        "image float32 [batch, 3, 4*height, 4*width] to latents"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_parts_that_do_not_fit_are_refused_by_name(pipeline_bundle, wrong):
    bundle = pipeline_bundle("sd")
    change, error = WRONG[wrong]
    check_pipeline(bundle.model, bundle.segments, bundle.pipeline)
    with pytest.raises(BundleFormatError) as caught:
        check_pipeline(bundle.model, bundle.segments, change(bundle.pipeline))
    assert error in str(caught.value)


def test_a_folder_without_a_tokenizer_has_no_text_encoder(folder):
    shutil.rmtree(folder / "tokenizer")
    parts = load_parts(folder)
    assert parts.names == ("decoder", "encoder")
    assert "Expected a tokenizer in" in parts.refused["text_encoder"]
    with pytest.raises(ConfigError, match="no folder of that name exists"):
        load_parts("nowhere")
