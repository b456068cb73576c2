"""Fixtures that several test files share: tiny models, compiled once a session."""

from __future__ import annotations

import enum
import gc
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

# One profile for all properties: a busy machine must not fail a test that is right.
settings.register_profile("blockcache", deadline=None)
settings.load_profile("blockcache")

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}

_CROSS, _PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
_UP_CROSS, _UP_PLAIN = "CrossAttnUpBlock2D", "UpBlock2D"
_BASE: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (32, 64, 64),
    "down_block_types": (_CROSS, _CROSS, _PLAIN),
    "up_block_types": (_UP_PLAIN, _UP_CROSS, _UP_CROSS),
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}

_SMALL: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": (_CROSS, _PLAIN),
    "up_block_types": (_UP_PLAIN, _UP_CROSS),
}

_SDXL: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}

TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "sd": _BASE,
    "small": {**_BASE, **_SMALL},
    "sdxl-small": {**_BASE, **_SMALL, **_SDXL},
    "sdxl": {
        **_BASE,
        **_SDXL,
        "transformer_layers_per_block": (1, 2, 2),
        "use_linear_projection": True,
    },
    "refiner": {  # SDXL's: five time_ids, one text encoder
        **_BASE,
        **_SMALL,
        **_SDXL,
        "projection_class_embeddings_input_dim": 72,
    },
    "pooled-prompt": {
        **_BASE,
        **_SMALL,
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 4,
    },
    "two-layers": {
        **_BASE,
        "layers_per_block": 2,
        "block_out_channels": (32, 64),
        "down_block_types": (_CROSS, _CROSS),
        "up_block_types": (_UP_CROSS, _UP_CROSS),
    },
    "one-level": {
        **_BASE,
        "down_block_types": (_PLAIN, _CROSS, _PLAIN),
        "up_block_types": (_UP_PLAIN, _UP_CROSS, _UP_PLAIN),
    },
    "class-conditioned": {
        **_BASE,
        "num_class_embeds": 5,
        "block_out_channels": (32, 64),
        "down_block_types": (_PLAIN, _CROSS),
        "up_block_types": (_UP_CROSS, _UP_PLAIN),
        "resnet_time_scale_shift": "scale_shift",
    },
    "inpaint": {**_BASE, **_SMALL, "in_channels": 9},
    "sdxl-inpaint": {**_BASE, **_SMALL, **_SDXL, "in_channels": 9},
    "instruct-pix2pix": {**_BASE, **_SMALL, "in_channels": 8},
    "sdxl-instruct-pix2pix": {**_BASE, **_SMALL, **_SDXL, "in_channels": 8},
    "depth2img": {**_BASE, **_SMALL, "in_channels": 5},
    "upscale": {**_BASE, **_SMALL, "in_channels": 7, "num_class_embeds": 5},
}


CONTROLLED = {"controlled": ("small", 1), "sdxl-controlled": ("sdxl-small", 2)}
"""Of such a kind: the U-Net's kind, and the number of ControlNets."""


class SharedTraces:
    """Stands in for ``torch.onnx.export``: runs it once a model and keeps the graph in a folder.

    Tracing takes most of the time of a tiny model's compile, and many tests compile the same
    models. The graphs are kept for one run of the suite, and its workers share them. Processes that
    tests start trace for themselves; equal bytes of two traces are shown by two of them.
    """

    def __init__(self, export: Callable[..., Any], folder: Path) -> None:
        self._export, self._folder = export, folder

    def __call__(self, module: Any, arguments: Any, **options: Any) -> Any:
        """A graph of its own for every caller, its weights in a file."""
        import onnx_ir as ir
        from filelock import FileLock

        folder = self._folder / trace_key(module, arguments, options)
        self._folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                gc.disable()  # the collector takes a fifth of a trace's time
                try:
                    program = self._export(module, arguments, **options)
                finally:
                    gc.enable()
                written = folder.with_suffix(".part")
                written.mkdir(exist_ok=True)
                ir.save(program.model, written / "model.onnx", external_data="weights.bin")
                written.rename(folder)
        return SimpleNamespace(model=ir.load(folder / "model.onnx"))


def trace_key(module: Any, arguments: Any, options: Any) -> str:
    """A digest of all that a trace depends on: code, weights, settings, shapes."""
    import torch

    digest = hashlib.sha256()
    for line in _described(module):
        digest.update(line.encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    digest.update(repr([(tuple(each.shape), each.dtype) for each in arguments]).encode())
    digest.update(repr(sorted(options.items())).encode())
    return digest.hexdigest()


def _described(module: Any) -> Iterator[str]:
    """Every module with its class and plain attributes; of other attributes the class."""
    for name, each in module.named_modules():
        yield f"{name} {type(each).__module__}.{type(each).__qualname__}"
        attributes = ((key, _plain(value)) for key, value in vars(each).items())
        yield str(sorted(pair for pair in attributes if pair[0] != "name_or_path"))  # its folder
        settings = getattr(each, "config", {})  # of diffusers or of transformers
        settings = settings.to_dict() if hasattr(settings, "to_dict") else dict(settings)
        kept = {key: value for key, value in settings.items() if not key.startswith("_")}
        yield json.dumps(kept, default=str, sort_keys=True)


def _plain(value: Any) -> str:
    if isinstance(value, bool | int | float | str | tuple | type(None)):
        return repr(value)
    return f"{type(value).__module__}.{type(value).__qualname__}"


@pytest.fixture(scope="session", autouse=True)
def shared_traces(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every model is traced once in a run of the suite; see ``SharedTraces``."""
    try:
        import onnx_ir  # noqa: F401 (whether it is there)
        import torch
    except ImportError:
        yield
        return
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    folder = Path(os.environ.get("BLOCKCACHE_TEST_TRACES") or shared / "traces")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLOCKCACHE_TEST_TRACES", str(folder))  # for a pytest that a test starts
        patch.setattr(torch.onnx, "export", SharedTraces(torch.onnx.export, folder))
        yield


def make_controlnet(unet: Any, seed: int = 0) -> Any:
    """A ControlNet for a U-Net; its zero convolutions are random, so that it does something."""
    import torch
    from diffusers import ControlNetModel

    torch.manual_seed(seed)
    embedding = (8, 16, 16)  # two downsamplings: pictures are four times as large as latents
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=embedding)
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return net


def make_tiny_model(kind: str, precision: str = "float32") -> Any:
    """A randomly initialised U-Net of one of the kinds, as a SourceModel."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from blockcache.export.unet.model import describe

    torch.set_num_threads(1)  # tiny operations: a second thread only waits
    torch.manual_seed(0)
    base, nets = CONTROLLED.get(kind, (kind, 0))
    unet = diffusers.UNet2DConditionModel(**TINY_CONFIGS[base])
    controlnets = [make_controlnet(unet, seed) for seed in range(nets)]
    if precision != "float32":
        for network in (unet, *controlnets):
            network.to(getattr(torch, precision))
    return describe(
        unet, name=f"tiny-{kind}", tokens=7, scheduler=SCHEDULER, controlnets=controlnets
    )


def make_conditions(
    model: Any, count: int, seed: int = 0, size: tuple[int, int] | None = None
) -> dict[str, np.ndarray]:
    """Random conditions [count, ...] for a SourceModel, at its own latent size or another."""
    from dataclasses import replace

    rng = np.random.default_rng(seed)
    height, width = size or model.sample_size
    sizes = replace(model.sizes(batch=count), height=height, width=width)
    made = {}
    for condition in model.conditions:
        shape = condition.sized(sizes)
        if condition.dtype == "int64":
            made[condition.name] = rng.integers(0, 5, shape)
        elif condition.name.startswith("control_scale"):  # off at the first and the last steps
            made[condition.name] = np.tile(np.float32([0.8, 800, 200]), (count, 1))
        else:
            made[condition.name] = rng.standard_normal(shape).astype(np.float32)
    return made


@pytest.fixture(scope="session")
def tiny_models() -> Any:
    """``tiny_models(kind)`` gives a SourceModel, made once a kind."""
    made: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in made:
            made[kind] = make_tiny_model(kind)
        return made[kind]

    return get


@pytest.fixture(scope="session")
def conditions_of() -> Any:
    """``conditions_of(model, count, seed=0, size=None)`` gives random conditions by name."""
    return make_conditions


@pytest.fixture(scope="session")
def compiled(tiny_models: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``compiled(kind, outputs, precision, cuts)`` gives (SourceModel, Bundle): ddim-4, dpm-20."""
    made: dict[tuple[Any, ...], Any] = {}

    def get(
        kind: str = "sd",
        outputs: int = 1,
        precision: str = "float32",
        cuts: tuple[int, ...] = (),
    ) -> Any:
        key = (kind, outputs, precision, cuts)
        if key not in made:
            from blockcache.export.choose.preset import PresetOptions
            from blockcache.export.pipeline import (
                CompileOptions,
                ExportOptions,
                compile_model,
            )

            folder = tmp_path_factory.mktemp(f"{kind}-{outputs}-{precision}") / "bundle"
            presets = tuple(PresetOptions.parse(text) for text in ("ddim:4", "dpm:20"))
            export = ExportOptions(outputs=outputs, precision=precision, cuts=cuts)
            options = CompileOptions(presets=presets, export=export)
            single = precision == "float32"
            model = tiny_models(kind) if single else make_tiny_model(kind, precision)
            made[key] = (model, compile_model(model, folder, options).bundle)
        return made[key]

    return get


@pytest.fixture
def blockcache(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """``blockcache(*arguments)`` gives (exit code, stdout, stderr)."""
    import sys

    from blockcache.tools import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["blockcache", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


PIPELINE_TOKENS = 9
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def make_tokenizer(folder: Path) -> Any:
    """CLIP's, with letters for a vocabulary."""
    transformers = pytest.importorskip("transformers")
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    vocabulary = {w: i for i, w in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=PIPELINE_TOKENS
    )


def make_text_encoder(kind: str, tokenizer: Any, width: int, pooled: int = 16) -> Any:
    """With the same weights in every pipeline, so that it is traced once."""
    import torch
    import transformers

    torch.manual_seed(len(kind))  # SDXL's two differ
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=PIPELINE_TOKENS,
        projection_dim=pooled,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return getattr(transformers, kind)(config).eval()


def make_vae() -> Any:
    """Pictures are four times as large as latents. The same weights in every pipeline."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(2)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
    ).eval()


def make_pipeline(kind: str, unet: Any, folder: Path) -> Any:
    import diffusers

    tokenizer = make_tokenizer(folder)
    shared = {
        "unet": unet,
        "vae": make_vae(),
        "scheduler": diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
    }
    if kind == "upscale":  # what its pipeline wants to see
        shared["vae"].register_to_config(scaling_factor=0.08333)
    projecting = "CLIPTextModelWithProjection"
    unchecked = {"safety_checker": None, "feature_extractor": None}
    own = {  # of those with one text encoder: the class, and what it takes besides
        "sd": ("", {**unchecked, "requires_safety_checker": False}),
        "controlled": ("", {**unchecked, "requires_safety_checker": False}),
        "inpaint": ("Inpaint", {**unchecked, "requires_safety_checker": False}),
        "instruct-pix2pix": ("InstructPix2Pix", {**unchecked, "requires_safety_checker": False}),
        "depth2img": ("Depth2Img", {"depth_estimator": None, "feature_extractor": None}),
        "upscale": ("Upscale", {"low_res_scheduler": diffusers.DDPMScheduler(), **unchecked}),
    }
    if kind in own:
        name, others = own[kind]
        return getattr(diffusers, f"StableDiffusion{name}Pipeline")(
            **shared,
            text_encoder=make_text_encoder("CLIPTextModel", tokenizer, 32),
            tokenizer=tokenizer,
            **others,
        )
    if kind == "refiner":
        return diffusers.StableDiffusionXLImg2ImgPipeline(
            **shared,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=make_text_encoder(projecting, tokenizer, 32, pooled=32),
            tokenizer_2=tokenizer,
            requires_aesthetics_score=True,
            add_watermarker=False,
        )
    named = {"sdxl-inpaint": "Inpaint", "sdxl-instruct-pix2pix": "InstructPix2Pix"}.get(kind, "")
    return getattr(diffusers, f"StableDiffusionXL{named}Pipeline")(
        **shared,
        text_encoder=make_text_encoder("CLIPTextModel", tokenizer, 16),
        tokenizer=tokenizer,
        text_encoder_2=make_text_encoder(projecting, tokenizer, 16),
        tokenizer_2=tokenizer,
        force_zeros_for_empty_prompt=kind != "sdxl-encodes-empty",
        add_watermarker=False,
    )


PIPELINES = {"sdxl-encodes-empty": "sdxl"}
"""The kind of the U-Net, where it has another name than the pipeline's."""


@pytest.fixture(scope="session")
def pipeline_folder(tiny_models: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``pipeline_folder(kind)`` gives the folder of a pipeline, saved once a kind."""
    pytest.importorskip("torch")
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            unet = tiny_models(PIPELINES.get(kind, kind)).unet
            pipeline = make_pipeline(kind, unet, folder / "tokenizer")
            pipeline.save_pretrained(folder / f"tiny-{kind}")
            made[kind] = folder / f"tiny-{kind}"
        return made[kind]

    return get


@pytest.fixture(scope="session")
def pipeline_bundle(pipeline_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``pipeline_bundle(kind)`` gives a bundle of a whole pipeline: ddim-4."""
    made: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in made:
            from blockcache.export import (
                CompileOptions,
                PresetOptions,
                compile_model,
                load_model,
                load_parts,
            )

            folder = pipeline_folder(kind)
            options = CompileOptions(presets=(PresetOptions.parse("ddim:4"),))
            made[kind] = compile_model(
                load_model(folder),
                tmp_path_factory.mktemp(f"{kind}-pipeline") / "bundle",
                options,
                parts=load_parts(folder),
            ).bundle
        return made[kind]

    return get


@pytest.fixture(scope="session")
def driver_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in CUDA driver of ``tests/cuda_driver``, compiled; for processes of their own."""
    import shutil
    import subprocess

    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    source = Path(__file__).parent / "cuda_driver" / "driver.cpp"
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    named = ["-Wl,-soname,libcuda.so.1", "-o", str(library)]  # found by this name once it is loaded
    subprocess.run([compiler, *options, str(source), *named], check=True)
    return library


@pytest.fixture(scope="session")
def copied_segments() -> Any:
    """``copied_segments(bundle, folder)`` stands in for an export: segments made before."""
    import dataclasses
    import shutil

    def copy(bundle: Any, folder: Path) -> tuple[Any, ...]:
        for path in bundle.segment_path(bundle.segments[0]).parent.iterdir():
            shutil.copy(path, folder)
        return tuple(dataclasses.replace(s, file=Path(s.file).name) for s in bundle.segments)

    return copy


@pytest.fixture(scope="session")
def reweighted() -> Any:
    """``reweighted(bundle, folder, factor)``: a copy without engines, all its weights scaled."""
    import dataclasses
    import shutil

    from blockcache.runtime.bundles.bundle import Bundle
    from blockcache.runtime.bundles.bundle_files import hash_files
    from blockcache.runtime.bundles.manifest import MANIFEST

    def make(bundle: Any, folder: Path, factor: float) -> Any:
        shutil.copytree(bundle.folder, folder, ignore=shutil.ignore_patterns("engines"))
        segments = (*bundle.segments, *bundle.manifest.parts)
        named = {name for segment in segments for name in bundle.segment_files(segment)[1:]}
        for name in named:
            weights = np.fromfile(folder / name, np.float32)
            plain = np.isfinite(weights) & (np.abs(weights) > 1e-6)  # whole numbers look smaller
            weights[plain] *= np.float32(factor)
            weights.tofile(folder / name)
        files = {**bundle.manifest.files, **hash_files(folder, named)}
        manifest = dataclasses.replace(bundle.manifest, files=files)
        (folder / MANIFEST).write_text(manifest.to_json())
        return Bundle.open(folder)

    return make


@pytest.fixture
def bundle_copy(compiled: Any, tmp_path: Path) -> Path:
    """A private copy of the tiny SD-like bundle, free to be damaged."""
    import shutil

    _, bundle = compiled("sd")
    return Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))


class TwinLibrary:
    """The CUDA library's functions on host memory: the host library's, less what only CUDA takes.

    Both are compiled from one source, so that arguments that are right here are right there.
    """

    @property
    def _host(self) -> Any:
        from blockcache import kernels

        return kernels.host_library()

    def bc_error_string(self, code: int) -> bytes:
        text: bytes = self._host.bc_error_string(code)
        return text

    def bc_cuda_guidance_rescale_factors(self, *arguments: Any) -> Any:
        return self._host.bc_host_guidance_rescale_factors(*arguments[:-1])

    def bc_cuda_guided_solver_step(self, *arguments: Any) -> Any:
        return self._host.bc_host_guided_solver_step(*arguments[:-1])

    def bc_cuda_scale_shift_residual(self, *arguments: Any) -> Any:
        return self._host.bc_host_scale_shift_residual(*arguments[:-1])

    def bc_cuda_relative_change_workspace_bytes(self, samples: int, _elements: int) -> int:
        return 16 * samples

    def bc_cuda_relative_change(self, *arguments: Any) -> Any:
        *rest, workspace, size, _stream = arguments
        assert workspace
        assert size == 16 * rest[5]
        return self._host.bc_host_relative_change(*rest)


@pytest.fixture(scope="session")
def twin_library() -> TwinLibrary:
    """Stands in for ``kernels.cuda_library()`` where tensors are on the host."""
    return TwinLibrary()


TENSORRT_API = Path(__file__).parent / "golden" / "tensorrt_api.json"


class Recorded:
    """A fake object limited to the members that its class has in a library's wheel."""

    def __init__(self, where: str, members: list[str], fake: Any) -> None:
        object.__setattr__(self, "_recorded", (where, frozenset(members), fake))

    def _fake(self, name: str) -> Any:
        where, members, fake = object.__getattribute__(self, "_recorded")
        if name not in members:
            raise AttributeError(f"{where} has no {name!r}")
        return fake

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fake(name), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._fake(name), name, value)


class TensorRTModule(SimpleNamespace):
    """The enumerations of a library as its wheel has them, and recorded fakes of its classes."""

    def __init__(self, title: str) -> None:
        self.name, self.__version__ = title.split()
        self.api = json.loads(TENSORRT_API.read_text())[title]
        enums = {name: m for name, m in self.api.items() if isinstance(m, dict)}
        for name, members in enums.items():
            setattr(self, name, enum.IntEnum(name, members))

    def recorded(self, kind: str, fake: Any) -> Recorded:
        """``fake`` with nothing but what ``kind`` has in this library."""
        return Recorded(f"{self.name} {self.__version__}: {kind}", self.api.get(kind, []), fake)


@pytest.fixture(params=sorted(json.loads(TENSORRT_API.read_text())))
def tensorrt_module(request: pytest.FixtureRequest) -> TensorRTModule:
    """Each recorded library in turn; the names are those of ``tools/dev``'s recorder."""
    return TensorRTModule(request.param)


@pytest.fixture
def tensorrt_module_of() -> Any:
    """``tensorrt_module_of("tensorrt 10.8")``: a recorded library by the start of its title."""
    titles = json.loads(TENSORRT_API.read_text())
    return lambda start: TensorRTModule(next(t for t in titles if t.startswith(start)))
