"""LoRA files: merged as diffusers fuses them, recorded, refused by name where they do not fit."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from blockcache.export import (  # noqa: E402
    CompileOptions,
    Lora,
    compile_model,
    encode_text,
    load_model,
    load_parts,
)
from blockcache.export.parts.load import _text_encoder  # noqa: E402
from blockcache.runtime.bundles.bundle import Bundle  # noqa: E402
from blockcache.runtime.errors import ConfigError  # noqa: E402

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "time_emb_proj"]
ALPHA, RANK = 6, 3


def write_lora(path, folder, *, text=True, seed=1):
    """A file as diffusers saves it, of random numbers, for the pipeline in a folder."""
    from diffusers import StableDiffusionPipeline

    rng = torch.Generator().manual_seed(seed)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    parts = {"unet": (pipeline.unet, TARGETS)}
    if text:
        parts["text_encoder"] = (pipeline.text_encoder, ["q_proj", "out_proj", "fc1"])
    tensors = {}
    for part, (model, targets) in parts.items():
        for name, module in model.named_modules():
            if not name.endswith(tuple(f".{target}" for target in targets)):
                continue
            out, into, *kernel = module.weight.shape
            nested = "text_model." if part == "text_encoder" else ""
            stem = f"{part}.{nested}{name.removeprefix('text_model.')}"
            a = torch.randn(RANK, into, *kernel, generator=rng) * 0.1
            b = torch.randn(out, RANK, *[1] * len(kernel), generator=rng) * 0.1
            tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = a, b
    config = {"r": RANK, "lora_alpha": ALPHA, "rank_pattern": {}, "alpha_pattern": {}}
    config |= {"target_modules": TARGETS, "peft_type": "LORA"}
    said = {f"{part}.{key}": value for part in parts for key, value in config.items()}
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(said)})
    return path


def as_kohya(path, source):
    """The same LoRA by the names of kohya's scripts, alphas beside it."""
    made = {}
    for name, values in load_file(source).items():
        part, _, rest = name.partition(".")
        module, _, matrix = rest.partition(".lora_")
        stem = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part] + module.replace(".", "_")
        made[f"{stem}.lora_{'down' if matrix.startswith('A') else 'up'}.weight"] = values
        made[f"{stem}.alpha"] = torch.tensor(float(ALPHA))
    save_file(made, path)
    return path


@pytest.fixture(scope="module")
def lora(pipeline_folder, tmp_path_factory):
    return write_lora(tmp_path_factory.mktemp("lora") / "style.safetensors", pipeline_folder("sd"))


@pytest.fixture(scope="module")
def unet_lora(pipeline_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "unet.safetensors"
    return write_lora(path, pipeline_folder("sd"), text=False, seed=2)


def expected(plain, files, prefix="unet."):
    """W + scale * alpha / rank * B A, in float64."""
    weights = {name: values.double() for name, values in plain.items()}
    for path, scale in files:
        tensors = load_file(path)
        for name in (n for n in tensors if n.startswith(prefix) and ".lora_A." in n):
            a, b = tensors[name].double(), tensors[name.replace("lora_A", "lora_B")].double()
            delta = (b.flatten(1) @ a.flatten(1)) * scale * ALPHA / RANK
            key = name.removeprefix(prefix).replace(".lora_A.weight", ".weight")
            key = key if key in weights else key.removeprefix("text_model.")
            weights[key] = weights[key] + delta.reshape(weights[key].shape)
    return weights


def assert_near(state, wanted):
    assert state.keys() == wanted.keys()
    for name, values in state.items():
        assert torch.allclose(values.double(), wanted[name], rtol=1e-5, atol=1e-6), name


def test_the_unet_gets_the_sum_of_the_products(pipeline_folder, lora, unet_lora):
    folder = pipeline_folder("sd")
    plain = load_model(folder)
    merged = load_model(folder, loras=(Lora(lora, 0.7), Lora(unet_lora, -1.5)))
    state = merged.unet.state_dict()
    assert_near(state, expected(plain.unet.state_dict(), [(lora, 0.7), (unet_lora, -1.5)]))
    changed = [n for n, v in plain.unet.state_dict().items() if not torch.equal(v, state[n])]
    assert len(changed) > 20
    assert merged.sha256 != plain.sha256
    assert [(each.name, each.scale) for each in merged.loras] == [
        ("style.safetensors", 0.7),
        ("unet.safetensors", -1.5),
    ]
    assert merged.blocks == plain.blocks
    assert load_model(folder, loras=(Lora(lora, 0.7),)).sha256 not in (plain.sha256, merged.sha256)


def test_the_unet_is_that_of_a_fused_pipeline(pipeline_folder, lora):
    pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline

    folder = pipeline_folder("sd")
    unet = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).unet
    tensors, _, metadata = StableDiffusionPipeline.lora_state_dict(
        str(lora.parent), weight_name=lora.name, return_lora_metadata=True
    )
    StableDiffusionPipeline.load_lora_into_unet(tensors, None, unet, metadata=metadata)
    unet.fuse_lora(lora_scale=0.7)
    unet.unload_lora()
    merged = load_model(folder, loras=(Lora(lora, 0.7),))
    assert_near(merged.unet.state_dict(), unet.double().state_dict())


def test_prompts_are_encoded_by_the_merged_text_encoder(pipeline_folder, lora, unet_lora):
    folder = pipeline_folder("sd")

    def states(*loras):
        return encode_text(folder, ["a fox"], loras=loras)[0]["encoder_hidden_states"]

    (part,) = _text_encoder(folder, "text_encoder", "CLIPTextModel", None, False, (Lora(lora),))
    assert not np.allclose(states(Lora(lora)), states(), atol=1e-3)
    assert np.array_equal(states(Lora(unet_lora)), states())
    assert part.role == "text_encoder"


def test_kohyas_names_give_the_same(pipeline_folder, lora, tmp_path):
    folder, kohya = pipeline_folder("sd"), as_kohya(tmp_path / "kohya.safetensors", lora)
    one, other = (load_model(folder, loras=(Lora(path, 0.5),)).unet for path in (kohya, lora))
    for name, values in one.state_dict().items():
        assert torch.equal(values, other.state_dict()[name]), name
    one, other = (
        encode_text(folder, ["a fox"], loras=(Lora(path, 0.5),))[0] for path in (kohya, lora)
    )
    assert np.array_equal(one["encoder_hidden_states"], other["encoder_hidden_states"])


def test_half_precision_is_rounded_once(pipeline_folder, unet_lora):
    folder, loras = pipeline_folder("sd"), (Lora(unet_lora, 1.0),)
    single = load_model(folder, loras=loras).unet.state_dict()
    half = load_model(folder, dtype="bfloat16", loras=loras).unet.state_dict()
    for name, values in half.items():
        assert torch.equal(values, single[name].to(torch.bfloat16)), name


def test_parts_change_with_the_files_that_hold_something_for_them(pipeline_folder, lora, unet_lora):
    folder = pipeline_folder("sd")

    def hashes(*loras):
        return {part.name: part.sha256 for part in load_parts(folder, loras=loras).parts}

    plain, merged = hashes(), hashes(Lora(lora))
    assert hashes(Lora(unet_lora)) == plain
    assert {name for name in plain if plain[name] != merged[name]} == {"text_encoder"}
    (encoder,) = _text_encoder(folder, "text_encoder", "CLIPTextModel", None, False, (Lora(lora),))
    (base,) = _text_encoder(folder, "text_encoder", "CLIPTextModel", None, False, ())
    wanted = expected(base.load(torch.float32).model.state_dict(), [(lora, 1.0)], "text_encoder.")
    assert_near(encoder.load(torch.float32).model.state_dict(), wanted)


def test_a_merged_bundle_has_the_plain_graphs_and_presets(
    pipeline_folder, compiled, unet_lora, tmp_path
):
    folder = pipeline_folder("sd")
    _, plain = compiled("sd")
    merged = load_model(folder, loras=(Lora(unet_lora, 0.5),))
    options = CompileOptions(presets=(), like=plain)
    bundle = compile_model(merged, tmp_path / "bundle", options).bundle
    assert bundle.preset_names == plain.preset_names
    assert bundle.recommended == plain.recommended
    assert bundle.weights != plain.weights
    for name in plain.preset_names:
        assert bundle.preset(name).schedule == plain.preset(name).schedule
    for one, other in zip(bundle.segments, plain.segments, strict=True):
        hashes = [b.manifest.files[s.file].sha256 for b, s in ((bundle, one), (plain, other))]
        assert hashes[0] == hashes[1], one.name
    again = Bundle.open(tmp_path / "bundle")
    (facts,) = again.manifest.loras
    assert (facts.name, facts.scale, facts.sha256) == (
        "unet.safetensors",
        0.5,
        Lora(unet_lora).sha256,
    )
    assert plain.manifest.loras == ()


def test_presets_of_another_unet_are_refused(pipeline_folder, compiled, tmp_path):
    _, plain = compiled("sd")
    model = dataclasses.replace(plain.model, blocks=plain.model.blocks[1:])
    other = dataclasses.replace(plain, manifest=dataclasses.replace(plain.manifest, model=model))
    with pytest.raises(ConfigError, match=r"same U-Net with other weights.*other blocks"):
        compile_model(
            load_model(pipeline_folder("sd")),
            tmp_path / "bundle",
            CompileOptions(presets=(), like=other),
        )


def altered(source, path, change):
    tensors = load_file(source)
    change(tensors)
    save_file(tensors, path)
    return path


def first(tensors):
    return next(name for name in tensors if "lora_A" in name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({"unet.nowhere.to_q.lora_A.weight": torch.zeros(1, 1)}),
            r"has 'nowhere.to_q', which the unet does not have",
        ),
        (
            lambda t: t.pop(first(t)),
            r"has lora_B without its other half for 'down_blocks",
        ),
        (
            lambda t: t.update({first(t): t[first(t)].repeat(1, 2, *[1] * (t[first(t)].ndim - 2))}),
            r"altered.safetensors has A .* and B .* for 'down_blocks.*', whose weight has shape",
        ),
        (
            lambda t: t.update({"transformer.to_q.lora_A.weight": torch.zeros(1, 1)}),
            r"for unet, text_encoder, text_encoder_2 in .*, got 'transformer.to_q.lora_A.weight'",
        ),
        (
            lambda t: t.update({"unet.a.dora_scale": torch.zeros(1)}),
            r"plain LoRA in .*, got a DoRA \('unet.a.dora_scale'\)",
        ),
        (
            lambda t: t.update({"text_encoder_2.q_proj.lora_A.weight": torch.zeros(1, 1)}),
            r"changes a text_encoder_2 .*, which is not there",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    pipeline_folder, unet_lora, tmp_path, change, message
):
    path = altered(unet_lora, tmp_path / "altered.safetensors", change)
    with pytest.raises(ConfigError, match=message):
        load_model(pipeline_folder("sd"), loras=(Lora(path),))


def test_a_pickle_and_a_truncated_file_are_refused(pipeline_folder, unet_lora, tmp_path):
    pickle = tmp_path / "style.bin"
    pickle.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"does not open pickles"):
        load_model(pipeline_folder("sd"), loras=(Lora(pickle),))
    short = tmp_path / "short.safetensors"
    short.write_bytes(unet_lora.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"truncated or damaged"):
        load_model(pipeline_folder("sd"), loras=(Lora(short),))


def test_a_file_and_its_scale_are_read(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(json.dumps({}).encode())
    assert Lora.parse(str(path)) == Lora(path, 1.0)
    assert Lora.parse(f"{path}:-0.25") == Lora(path, -0.25)
    with pytest.raises(ConfigError, match=r"found none. Give FILE or FILE:SCALE"):
        Lora.parse(str(tmp_path / "b.safetensors:1"))
    for scale in ("", "nan", "inf", "much"):
        with pytest.raises(ConfigError, match=r"Expected a finite scale behind the colon"):
            Lora.parse(f"{path}:{scale}")
