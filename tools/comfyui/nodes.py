"""The node: a bundle as ComfyUI's MODEL, and the SAMPLER and SIGMAS that its preset was made for.

The one file that knows ComfyUI's own modules, which only its process has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import comfy.supported_models
import folder_paths
import torch

from blockcache.runtime import Bundle, UnsupportedModelError
from blockcache.tools.comfyui.model import BundleModel
from blockcache.tools.comfyui.sampler import PresetSampler

FOLDER = "blockcache"
"""The folder of bundles, under ComfyUI's ``models/`` or where ``extra_model_paths.yaml`` says."""

folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))

_TYPES = {"epsilon": "EPS", "v_prediction": "V_PREDICTION"}


class BlockcacheLoader:
    """Loads a bundle; its MODEL stands where that of the checkpoint stood."""

    RETURN_TYPES = ("MODEL", "SAMPLER", "SIGMAS")
    FUNCTION = "load"
    CATEGORY = "loaders"
    DESCRIPTION = (
        "A U-Net that blockcache compiled. Connect all three outputs to SamplerCustom; CLIP and "
        "VAE come from the checkpoint that was compiled."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The bundles that there are, and a preset; none named is the recommended one."""
        return {
            "required": {
                "bundle": (sorted(_bundles()),),
                "preset": ("STRING", {"default": ""}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, bundle: str, preset: str) -> str:
        """Another value where the bundle was compiled again."""
        return str((_bundles()[bundle] / "manifest.json").stat().st_mtime_ns)

    def load(self, bundle: str, preset: str) -> tuple[Any, Any, torch.Tensor]:
        """MODEL, SAMPLER and SIGMAS.

        Raises:
            UnsupportedModelError: a model that ComfyUI has no class for here.
            ConfigError: the preset runs a scheduler of diffusers.
            BundleError, EngineError: see ``Session.open``.
        """
        found = _bundles()
        if bundle not in found:
            raise FileNotFoundError(
                f"Expected a bundle of {sorted(found)} in models/{FOLDER}, got {bundle!r}."
            )
        opened = Bundle.open(found[bundle])
        device = comfy.model_management.get_torch_device()
        model = BundleModel(opened, preset.strip() or None)
        patcher = BundlePatcher(
            _base_model(model, opened),
            load_device=device,
            offload_device=comfy.model_management.unet_offload_device(),
        )
        wrapped = comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE
        patcher.add_wrapper_with_key(wrapped, FOLDER, model.during)
        sampler = comfy.samplers.KSAMPLER(PresetSampler(model.solver))
        return patcher, sampler, torch.from_numpy(model.sigmas).float()


class BundlePatcher(comfy.model_patcher.ModelPatcher):
    """A ModelPatcher that refuses what would be lost: the weights are in the engines."""

    def add_patches(self, *_: Any, **__: Any) -> Any:
        """Refused: LoRA, merges."""
        raise UnsupportedModelError(
            "A LoRA or another patch of weights would have no effect: the bundle runs the weights "
            "that it was compiled with. Take it out, or save the model with it and compile that."
        )

    add_hook_patches = add_patches


def _bundles() -> dict[str, Path]:
    """The folders with a manifest, by name."""
    roots = [Path(root) for root in folder_paths.get_folder_paths(FOLDER)]
    found = [path.parent for root in roots for path in root.glob("*/manifest.json")]
    return {folder.name: folder for folder in reversed(found)}  # of one name the first


def _base_model(model: BundleModel, bundle: Bundle) -> Any:
    """ComfyUI's class of the model, with the bundle in place of its U-Net."""
    prediction = model.solver.prediction
    if prediction not in _TYPES:
        raise UnsupportedModelError(
            f"Expected a model that predicts {' or '.join(_TYPES)}, this one predicts {prediction}."
        )
    kind = getattr(comfy.model_base.ModelType, _TYPES[prediction])
    name, family = _family(model, bundle)
    config = getattr(comfy.supported_models, name)({"disable_unet_model_creation": True})
    made = getattr(comfy.model_base, family)(config, model_type=kind)
    if model.micro_conditions:
        made.embedder = torch.nn.Identity()  # the bundle embeds sizes itself
    made.model_sampling.set_sigmas(torch.from_numpy(model.solver.noise.sigmas()))
    made.diffusion_model = model
    made.memory_required = lambda *_, **__: 0  # both guided halves in one batch
    return made


def _family(model: BundleModel, bundle: Bundle) -> tuple[str, str]:
    """The names in ``supported_models`` and ``model_base``."""
    others = {spec.name for spec in bundle.model.conditions} - {
        "encoder_hidden_states", "text_embeds", "time_ids",
    }  # fmt: skip
    if others or model.micro_conditions not in (0, 5, 6):
        raise UnsupportedModelError(
            f"Expected a U-Net of Stable Diffusion 1.x, 2.x, XL or its refiner, {bundle.folder} "
            f"takes {[spec.name for spec in bundle.model.conditions]}."
        )
    if model.micro_conditions:
        name = "SDXL" if model.micro_conditions == 6 else "SDXLRefiner"
        return name, name
    return "SD15", "BaseModel"  # SD 2.x differs in what its prediction type says


NODE_CLASS_MAPPINGS = {"BlockcacheLoader": BlockcacheLoader}
NODE_DISPLAY_NAME_MAPPINGS = {"BlockcacheLoader": "Load blockcache bundle"}
