"""The one door to diffusers: load a U-Net, refuse what is not supported, name its blocks.

A source model is a diffusers folder or hub id that holds ``unet/`` and, optionally,
``scheduler/``. Everything the exporter needs to know is read from the configs; no shape is
typed by hand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from blockcache.runtime.errors import ConfigError, MissingExtraError, UnsupportedModelError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
DEFAULT_TOKENS = 77
"""Prompt length where the folder names no tokenizer: that of CLIP."""

_STAGE_ORDER = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
BLOCK_CLASSES = {"transformers": "Transformer2DModel", "resnets": "ResnetBlock2D"}
"""What may be cached, by name: the module class whose residual branch is a block. The paper caches
spatial transformers (section 3.3) and shows why ResBlocks are a bad choice (Fig. 8)."""


@dataclass(frozen=True)
class Block:
    """A cacheable unit: the residual branch C_i of one spatial transformer (eq. 4, 5)."""

    path: str  # module path inside the U-Net, e.g. "mid_block.attentions.0"
    channels: int  # C_k, of its input and output


@dataclass(frozen=True)
class Condition:
    """An input of the U-Net besides sample and timestep."""

    name: str
    shape: tuple[int | str, ...]  # ints, or the axis names "batch" and "tokens"
    dtype: str  # "model": the model's own floating dtype; else "int64"


@dataclass(frozen=True)
class SourceModel:
    """A loaded U-Net with everything the stages ask about it."""

    name: str
    unet: UNet2DConditionModel
    scheduler: Mapping[str, Any]  # scheduler_config.json, {} where the folder has none
    blocks: tuple[Block, ...]  # in execution order
    conditions: tuple[Condition, ...]
    tokens: int
    sha256: str  # of the config and the weights: the key of every later stage

    @property
    def downsampling(self) -> int:
        """Height and width of the latents are multiples of this."""
        return int(2 ** (len(self.unet.config.block_out_channels) - 1))

    @property
    def sample_size(self) -> tuple[int, int]:
        """Default latent (height, width)."""
        size = self.unet.config.sample_size or 64
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


class UNetCall(torch.nn.Module):
    """The U-Net as a function of positional tensors, the same for export and reference.

    ``forward(sample [N,C,H,W], timestep [N], *conditions)`` gives the model output [N,C,H,W].
    """

    def __init__(self, unet: UNet2DConditionModel, names: Sequence[str]) -> None:
        super().__init__()
        self.unet = unet
        self.names = tuple(names)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, *conditions: torch.Tensor
    ) -> torch.Tensor:
        """One evaluation of the U-Net."""
        named = dict(zip(self.names, conditions, strict=True))
        arguments: dict[str, Any] = {
            key: named.pop(key) for key in ("encoder_hidden_states", "class_labels") if key in named
        }
        if named:
            arguments["added_cond_kwargs"] = named
        output: torch.Tensor = self.unet(sample, timestep, return_dict=False, **arguments)[0]
        return output


def load_model(
    source: str | Path,
    *,
    dtype: str = "float32",
    name: str | None = None,
    cached: str = "transformers",
) -> SourceModel:
    """Load the U-Net of a diffusers folder or hub id in ``dtype``, ready for inference.

    Args:
        source: the folder, or a hub id such as "owner/model".
        dtype: of the weights in memory: float32, float16 or bfloat16.
        name: what the bundle calls the model; default the folder's name.
        cached: what the blocks are, a key of ``BLOCK_CLASSES``.

    Raises:
        ConfigError: no such folder, or one without a U-Net.
        UnsupportedModelError: the U-Net has a feature that the exporter refuses.
        MissingExtraError: diffusers is not installed.
    """
    try:
        from diffusers import UNet2DConditionModel
    except ImportError as error:
        raise MissingExtraError.of("diffusers", "export", "Loading a U-Net") from error
    folder = _resolve(source)
    unet_folder = folder / "unet" if (folder / "unet").is_dir() else folder
    config_path = unet_folder / "config.json"
    if not config_path.is_file():
        raise ConfigError(
            f"Expected a diffusers folder with unet/config.json at {folder}; it has none. "
            f"Give the folder that save_pretrained wrote."
        )
    config = json.loads(config_path.read_text())
    check_supported(config)
    variant = None if _has_plain_weights(unet_folder) else _variant(unet_folder)
    unet = UNet2DConditionModel.from_pretrained(
        unet_folder, variant=variant, torch_dtype=TORCH_DTYPES[dtype], use_safetensors=True
    )
    return describe(
        unet,
        name=name or Path(source).resolve().name,
        scheduler=_read_json(folder / "scheduler" / "scheduler_config.json"),
        tokens=_tokens(folder),
        sha256=_hash_folder(unet_folder),
        cached=cached,
    )


def describe(
    unet: UNet2DConditionModel,
    *,
    name: str,
    scheduler: Mapping[str, Any] | None = None,
    tokens: int = DEFAULT_TOKENS,
    sha256: str | None = None,
    cached: str = "transformers",
) -> SourceModel:
    """Wrap a U-Net that is in memory already; refuses unsupported features by name."""
    if cached not in BLOCK_CLASSES:
        raise ConfigError(f"Expected blocks of {tuple(BLOCK_CLASSES)}, got {cached!r}.")
    config = dict(unet.config)
    check_supported(config)
    unet.eval().requires_grad_(False)
    blocks = find_blocks(unet, BLOCK_CLASSES[cached])
    if not blocks:
        raise UnsupportedModelError(
            f"Expected a U-Net with {cached} ({BLOCK_CLASSES[cached]}); {name} has none, so there "
            f"is nothing to cache."
        )
    digest = sha256 or _hash_module(unet)
    if cached != "transformers":  # the same weights cut elsewhere are another model to all stages
        digest = hashlib.sha256(f"{digest} {cached}".encode()).hexdigest()
    return SourceModel(
        name=name,
        unet=unet,
        scheduler=dict(scheduler or {}),
        blocks=blocks,
        conditions=_conditions(config),
        tokens=tokens,
        sha256=digest,
    )


def find_blocks(
    unet: UNet2DConditionModel, class_name: str = BLOCK_CLASSES["transformers"]
) -> tuple[Block, ...]:
    """The cacheable blocks in execution order: down, middle, up."""
    found = []
    for path, module in unet.named_modules():
        if type(module).__name__ == class_name:
            channels = getattr(module, "out_channels", None) or module.in_channels
            found.append(Block(path, int(channels)))
    # diffusers registers up_blocks before mid_block; the sort is stable within a stage.
    return tuple(sorted(found, key=lambda block: _STAGE_ORDER[block.path.split(".")[0]]))


def check_supported(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError for features whose results the split would change."""
    refusals = {
        "IP-adapter or image projection (encoder_hid_dim_type)": config.get("encoder_hid_dim_type")
        not in (None, "text_proj"),
        f"added conditions of type {config.get('addition_embed_type')!r}": config.get(
            "addition_embed_type"
        )
        not in (None, "text", "text_time"),
        "GLIGEN gated attention (attention_type)": config.get("attention_type", "default")
        != "default",
        "guidance embedding (time_cond_proj_dim)": config.get("time_cond_proj_dim") is not None,
        "dual cross attention": bool(config.get("dual_cross_attention")),
        "class embedding concatenated to the time embedding": bool(
            config.get("class_embeddings_concat")
        ),
        f"{config.get('in_channels')} input for {config.get('out_channels')} output channels "
        f"(inpainting, image-conditioned)": config.get("in_channels") != config.get("out_channels"),
    }
    for feature, present in refusals.items():
        if present:
            raise UnsupportedModelError(
                f"This U-Net uses {feature}, which blockcache does not support. Supported are "
                f"text-conditioned U-Nets such as Stable Diffusion 1.x, 2.x and XL; ControlNet "
                f"residuals and adapters cannot be exported either."
            )


def _conditions(config: Mapping[str, Any]) -> tuple[Condition, ...]:
    """The inputs besides sample and timestep, from the config alone."""
    width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
    if not isinstance(width, int):
        width = width[0]
    found = [Condition("encoder_hidden_states", ("batch", "tokens", width), "model")]
    if config.get("addition_embed_type") == "text_time":
        # add_embedding takes [text_embeds, sinusoids of the six time_ids].
        ids = 6
        pooled = config["projection_class_embeddings_input_dim"] - ids * int(
            config["addition_time_embed_dim"]
        )
        found.append(Condition("text_embeds", ("batch", pooled), "model"))
        found.append(Condition("time_ids", ("batch", ids), "model"))
    kind = config.get("class_embed_type")
    if kind in ("projection", "simple_projection"):
        size = config["projection_class_embeddings_input_dim"]
        found.append(Condition("class_labels", ("batch", size), "model"))
    elif kind == "timestep":
        found.append(Condition("class_labels", ("batch",), "model"))
    elif kind == "identity":
        size = config.get("time_embedding_dim") or config["block_out_channels"][0] * 4
        found.append(Condition("class_labels", ("batch", size), "model"))
    elif config.get("num_class_embeds") is not None:
        found.append(Condition("class_labels", ("batch",), "int64"))
    return tuple(found)


def _resolve(source: str | Path) -> Path:
    """A local folder as it is; a hub id through huggingface_hub's cache."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists() or str(source).count("/") != 1:
        raise ConfigError(
            f"Expected a diffusers folder or a hub id such as 'owner/model', got {source!r}; "
            f"no folder of that name exists."
        )
    from huggingface_hub import snapshot_download

    try:
        wanted = ["unet/*", "scheduler/*", "tokenizer/tokenizer_config.json", "model_index.json"]
        return Path(snapshot_download(str(source), allow_patterns=wanted))
    except Exception as error:  # network, authorisation and naming errors share no base class
        raise ConfigError(
            f"{source!r} is no local folder and could not be fetched from the hub: {error}. "
            f"Give the path of a folder that save_pretrained wrote."
        ) from error


def _has_plain_weights(folder: Path) -> bool:
    return (folder / "diffusion_pytorch_model.safetensors").is_file() or (
        folder / "diffusion_pytorch_model.safetensors.index.json"
    ).is_file()


def _variant(folder: Path) -> str:
    """The weights' variant ("fp16", ...) where the folder holds no plain file."""
    for path in sorted(folder.glob("diffusion_pytorch_model*.safetensors*")):
        return path.name.split(".")[1].split("-")[0]
    raise ConfigError(
        f"Expected diffusion_pytorch_model*.safetensors in {folder}, found none. blockcache reads "
        f"safetensors only; convert other weights with save_pretrained."
    )


def _tokens(folder: Path) -> int:
    """Prompt length: the tokenizer's, else CLIP's."""
    config = _read_json(folder / "tokenizer" / "tokenizer_config.json")
    length = config.get("model_max_length", DEFAULT_TOKENS)
    return int(length) if length < 4096 else DEFAULT_TOKENS


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return content


def _hash_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.suffix in (".json", ".safetensors"):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
    return digest.hexdigest()


def _hash_module(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def decode_latents(folder: Path, latents: np.ndarray) -> np.ndarray:
    """Decode latents float32 [N, C, h, w] with the folder's VAE: uint8 [N, H, W, 3]."""
    from diffusers import AutoencoderKL

    if not (folder / "vae").is_dir():
        raise ConfigError(
            f"Expected a VAE in {folder}/vae, found none. Save latents instead: --out FILE.npy."
        )
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    with torch.no_grad():
        images = vae.decode(torch.from_numpy(latents) / vae.config.scaling_factor + shift).sample
    pixels = (images.clamp(-1, 1) + 1) * 127.5
    result: np.ndarray = pixels.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return result


def encode_text(
    source: str | Path, prompts: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Conditions of prompts and of the empty prompt, by the source's own text encoders.

    Returns float32 arrays by name: [P or 1, ...] for the prompts, [1, ...] for the empty one.
    """
    from diffusers import DiffusionPipeline

    folder = Path(source)
    if folder.is_dir() and not (folder / "text_encoder").is_dir():
        raise ConfigError(
            f"Expected text_encoder/ in {folder}: the profile needs prompts. Give a pipeline "
            f"folder, or --calibration FILE with encoded prompts."
        )
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            str(source), unet=None, vae=None, safety_checker=None
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Expected a pipeline with text encoders at {source}, got: {error}. Give a pipeline "
            f"folder, or --calibration FILE with encoded prompts."
        ) from error
    with torch.no_grad():
        positive, negative, *pooled = pipeline.encode_prompt(
            list(prompts),
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            negative_prompt=[""] * len(prompts),
        )
    conditions = {"encoder_hidden_states": positive}
    unconditional = {"encoder_hidden_states": negative[:1]}
    if pooled:
        size = float(pipeline.default_sample_size * pipeline.vae_scale_factor)
        conditions["text_embeds"], unconditional["text_embeds"] = pooled[0], pooled[1][:1]
        conditions["time_ids"] = torch.tensor([[size, size, 0, 0, size, size]])
    return (
        {name: tensor.float().numpy() for name, tensor in conditions.items()},
        {name: tensor.float().numpy() for name, tensor in unconditional.items()},
    )
