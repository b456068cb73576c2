"""A stand-in for the few classes of ComfyUI that the node touches, with their names and arguments.

``comfy`` gives the modules, a folder of bundles, and ``sample``, which does what ComfyUI does from
SamplerCustom down to ``apply_model``, for prompts that cover the whole picture.
"""

from __future__ import annotations

import copy
import importlib
import sys
import uuid
from enum import Enum
from types import ModuleType, SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")


class ModelType(Enum):
    EPS = 1
    V_PREDICTION = 2


class WrappersMP:
    SAMPLER_SAMPLE = "sampler_sample"
    DIFFUSION_MODEL = "diffusion_model"


class ModelSampling:
    """Of discrete training levels; x = x0 + sigma * noise."""

    def __init__(self, model_type):
        self.of_velocity = model_type is ModelType.V_PREDICTION
        self.set_sigmas(torch.linspace(0.03, 14.6, 1000))

    def set_sigmas(self, sigmas):
        self.sigmas = sigmas.float()

    def timestep(self, sigma):
        return (sigma.log() - self.sigmas.log()[:, None]).abs().argmin(0)

    def calculate_input(self, sigma, x):
        return x / (1 + sigma[:, None, None, None] ** 2).sqrt()

    def calculate_denoised(self, sigma, output, x):
        sigma = sigma[:, None, None, None]
        if self.of_velocity:
            return x / (sigma**2 + 1) - output * sigma / (sigma**2 + 1).sqrt()
        return x - output * sigma

    def noise_scaling(self, sigma, noise, latent_image, max_denoise):
        return noise * ((1 + sigma**2) ** 0.5 if max_denoise else sigma) + latent_image


class Supported:
    def __init__(self, unet_config):
        self.unet_config = dict(unet_config)


class BaseModel(torch.nn.Module):
    def __init__(self, model_config, model_type=ModelType.EPS, device=None):
        super().__init__()
        assert model_config.unet_config["disable_unet_model_creation"]
        self.model_type, self.model_sampling = model_type, ModelSampling(model_type)

    def encode_adm(self, **kwargs):
        return None

    def apply_model(
        self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None,
        **kwargs,
    ):  # fmt: skip
        dtype = self.diffusion_model.dtype
        output = self.diffusion_model(
            self.model_sampling.calculate_input(t, x).to(dtype),
            self.model_sampling.timestep(t).float(),
            context=c_crossattn.to(dtype),
            control=control,
            transformer_options=transformer_options,
            **{name: value.to(dtype) for name, value in kwargs.items()},
        )
        return self.model_sampling.calculate_denoised(t, output.float(), x)


class SDXL(BaseModel):
    """Sizes are embedded one by one, behind the pooled prompt."""

    sizes = ("height", "width", "crop_h", "crop_w", "target_height", "target_width")

    def __init__(self, model_config, model_type=ModelType.EPS, device=None):
        super().__init__(model_config, model_type, device)
        self.embedder = torch.nn.Linear(1, 256)

    def encode_adm(self, **kwargs):
        sizes = [self.embedder(torch.Tensor([kwargs[name]])) for name in self.sizes]
        return torch.cat([kwargs["pooled_output"], torch.cat(sizes)[None]], 1)


class SDXLRefiner(SDXL):
    sizes = ("height", "width", "crop_h", "crop_w", "aesthetic_score")


class ModelPatcher:
    def __init__(self, model, load_device, offload_device, size=0, weight_inplace_update=False):
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.model_options, self.wrappers = {"transformer_options": {}}, {}

    def clone(self):
        made = type(self)(self.model, self.load_device, self.offload_device)
        made.model_options = copy.deepcopy(self.model_options)
        made.wrappers = copy.deepcopy({k: dict.fromkeys(v) for k, v in self.wrappers.items()})
        for kind, by_key in self.wrappers.items():
            made.wrappers[kind] = {key: list(found) for key, found in by_key.items()}
        return made

    def add_wrapper_with_key(self, wrapper_type, key, wrapper):
        self.wrappers.setdefault(wrapper_type, {}).setdefault(key, []).append(wrapper)


class KSAMPLER:
    def __init__(self, sampler_function, extra_options=None, inpaint_options=None):
        self.sampler_function = sampler_function

    def sample(self, model, sigmas, extra_args, noise, latent_image):
        sampling = model.model_sampling
        highest = float(sigmas[0]) > float(sampling.sigmas[-1]) * (1 - 1e-5)
        x = sampling.noise_scaling(sigmas[0], noise, latent_image, highest)
        return self.sampler_function(
            lambda x, sigma, **extra: extra.pop("denoise")(x, sigma), x, sigmas,
            extra_args=extra_args, callback=lambda _: None, disable=True,
        )  # fmt: skip


def sample(
    patcher, noise, cfg, sampler, sigmas, positive, negative, *, seed=0, latent=None, apart=False,
    **conditions,
):  # fmt: skip
    """Final x [N, C, H, W]; prompts are [1, tokens, D], each with SDXL's conditions.

    ``apart`` evaluates the guided halves one after the other, as ComfyUI does where they do not fit
    together; other keywords go to the model as a node's would.
    """
    model, halves = patcher.model, [(1, negative, uuid.uuid4()), (0, positive, uuid.uuid4())]
    options = {**patcher.model_options["transformer_options"], "wrappers": patcher.wrappers}
    options["sample_sigmas"] = sigmas
    sizes = {name: conditions.pop(name) for name in list(conditions) if name in (
        *SDXL.sizes, "aesthetic_score", "pooled_output")}  # fmt: skip

    def evaluate(x, sigma, batch):
        rows = {"c_crossattn": torch.cat([half[1].expand(len(x), -1, -1) for half in batch])}
        adm = model.encode_adm(**sizes)
        if adm is not None:
            rows["y"] = adm.expand(len(x) * len(batch), -1)
        told = {**options, "sigmas": sigma, "uuids": [half[2] for half in batch],
                "cond_or_uncond": [half[0] for half in batch]}  # fmt: skip
        return model.apply_model(
            torch.cat([x] * len(batch)), torch.cat([sigma] * len(batch)),
            transformer_options=told, **rows, **conditions,
        ).chunk(len(batch))  # fmt: skip

    def denoise(x, sigma):
        if cfg == 1:
            return evaluate(x, sigma, halves[1:])[0]
        batches = [halves[:1], halves[1:]] if apart else [halves]
        unconditional, conditional = [x0 for batch in batches for x0 in evaluate(x, sigma, batch)]
        return unconditional + cfg * (conditional - unconditional)

    def run(guider, sigmas, extra_args, noise, latent):
        return sampler.sample(model, sigmas, extra_args, noise, latent)

    extra = {"seed": seed, "denoise": denoise}
    latent = torch.zeros_like(noise) if latent is None else latent
    for wrapper in patcher.wrappers.get(WrappersMP.SAMPLER_SAMPLE, {}).get("blockcache", []):
        inner = run
        run = lambda *given, wrapper=wrapper, inner=inner: wrapper(inner, *given)  # noqa: E731
    return run(None, sigmas, extra, noise, latent)


MODULES = {
    "comfy": {},
    "comfy.model_base": {
        "ModelType": ModelType, "BaseModel": BaseModel, "SDXL": SDXL, "SDXLRefiner": SDXLRefiner,
    },
    "comfy.model_management": {
        "get_torch_device": lambda: torch.device("cpu"),
        "unet_offload_device": lambda: torch.device("cpu"),
    },
    "comfy.model_patcher": {"ModelPatcher": ModelPatcher},
    "comfy.patcher_extension": {"WrappersMP": WrappersMP},
    "comfy.samplers": {"KSAMPLER": KSAMPLER},
    "comfy.supported_models": dict.fromkeys(("SD15", "SDXL", "SDXLRefiner"), Supported),
}  # fmt: skip


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    """ComfyUI's process: the node (an instance), its module, a folder of bundles, and classes."""
    models, roots = tmp_path_factory.mktemp("models"), {}
    paths = {
        "models_dir": str(models),
        "add_model_folder_path": lambda name, path: roots.setdefault(name, []).append(path),
        "get_folder_paths": lambda name: list(roots[name]),
    }
    with pytest.MonkeyPatch.context() as patch:
        made = {name: ModuleType(name) for name in (*MODULES, "folder_paths")}
        for name, module in made.items():
            vars(module).update(MODULES.get(name, paths))
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(made[parent], child, module)
            patch.setitem(sys.modules, name, module)
        for name in ("", ".nodes"):
            patch.delitem(sys.modules, f"blockcache.tools.comfyui{name}", raising=False)
        package = importlib.import_module("blockcache.tools.comfyui")
        yield SimpleNamespace(
            node=package.NODE_CLASS_MAPPINGS["BlockcacheLoader"](), models=models / "blockcache",
            sample=sample, KSAMPLER=KSAMPLER, WrappersMP=WrappersMP,
            nodes=sys.modules["blockcache.tools.comfyui.nodes"],
        )  # fmt: skip
        for name in ("", ".nodes"):
            patch.delitem(sys.modules, f"blockcache.tools.comfyui{name}", raising=False)
