"""The trained parts as a diffusers-format folder in 16 bits."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.models.modeling_utils import ModelMixin
from safetensors import safe_open
from safetensors.torch import save_file

from blockcache.runtime.errors import ConfigError
from blockcache.runtime.files import replacing, replacing_folder, write_text
from blockcache.tools.demo import checkpoint, text, unet
from blockcache.tools.demo.autoencoder import TinyAutoencoder
from blockcache.tools.demo.config import Preset
from blockcache.tools.demo.fit_autoencoder import load_autoencoder
from blockcache.tools.demo.model import PROMPTS_FILE, VARIANT
from blockcache.tools.demo.prompts import EMPTY, default_captions
from blockcache.tools.demo.train import FOLDER

SHARD_BYTES = 25_000_000  # no file of the model folder is larger
READABLE = 0o644


def averaged_unet(preset: Preset, work: Path) -> UNet2DConditionModel:
    """The U-Net with the averaged weights of the latest checkpoint."""
    path = work / FOLDER / checkpoint.NAME
    if not path.exists():
        raise ConfigError(
            f"Expected {path.name} in {path.parent}, found none. Run the command unet first."
        )
    model = unet.build(preset.unet, preset.latent_size)
    with safe_open(path, framework="pt") as file, torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(f"ema.{name}"))
    return model.eval()


def export(preset: Preset, work: Path, target: Path) -> None:
    """Write every part of the model folder, each swapped in whole."""
    target.mkdir(parents=True, exist_ok=True)
    model = averaged_unet(preset, work).half()
    autoencoder: TinyAutoencoder = load_autoencoder(work).half()
    scheduler = DPMSolverMultistepScheduler(**unet.SCHEDULE)
    with replacing_folder(target / "unet") as folder:
        _save(model, folder)
    with replacing_folder(target / "vae") as folder:
        _save(autoencoder, folder)
    with replacing_folder(target / "scheduler") as folder:
        scheduler.save_pretrained(folder)
    write_prompts(target)
    write_text(target / "model_index.json", json.dumps(model_index(), indent=2) + "\n")


def _save(model: ModelMixin, folder: Path) -> None:
    """As diffusers saves, less the path the model came from, and readable by everybody."""
    model.save_pretrained(folder, variant=VARIANT, max_shard_size=SHARD_BYTES)
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for path in folder.iterdir():
        path.chmod(READABLE)


def write_prompts(target: Path) -> None:
    """Store the token states of the default prompts and the empty one: float16 [P, 20, 384]."""
    prompts = [*default_captions(), EMPTY]
    states = torch.from_numpy(text.encode(prompts)).half()
    with replacing(target / PROMPTS_FILE) as file:
        save_file({"embeddings": states}, file.name, metadata={"prompts": json.dumps(prompts)})


def model_index() -> dict[str, object]:
    """What diffusers-style tools read first."""
    return {
        "_class_name": "DiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["blockcache.tools.demo.autoencoder", "TinyAutoencoder"],
    }
