"""U-Nets of full size with random weights: neither speed nor memory depends on their values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockcache.export import SourceModel

CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {  # stable-diffusion-v1-5: 860 M parameters, 512 x 512
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "sdxl": {  # stable-diffusion-xl-base-1.0: 2.6 B parameters, 1024 x 1024
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True,
    },
}

SMALL: dict[str, Any] = {
    "block_out_channels": (32, 64, 64, 64),
    "transformer_layers_per_block": 1,
    "attention_head_dim": 1,
    "layers_per_block": 1,
}
"""What makes a U-Net tiny and leaves its conditions as they are."""

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def random_source(
    model: str, precision: str, *, small: bool = False, controlnets: int = 0
) -> SourceModel:
    """The U-Net of a config in ``precision`` from the start: float32 would double the memory.

    ``small`` makes it a tiny one with the same conditions. Its ``controlnets`` are random all over,
    so that they do something, which fresh ones do not.
    """
    import torch
    from diffusers import ControlNetModel, UNet2DConditionModel

    from blockcache.export.unet.model import TORCH_DTYPES, describe

    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(TORCH_DTYPES[precision])
    try:
        unet = UNet2DConditionModel(**_config(model, small))
        nets = [
            ControlNetModel.from_unet(unet, load_weights_from_unet=False)
            for _ in range(controlnets)
        ]
    finally:
        torch.set_default_dtype(default)
    for net in nets:
        for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            torch.nn.init.normal_(layer.weight, std=0.1)
        last = net.controlnet_cond_embedding.conv_out
        torch.nn.init.normal_(last.weight, std=0.1)
    return describe(unet, name=model, scheduler=SCHEDULER, controlnets=nets)


def _config(model: str, small: bool) -> dict[str, Any]:
    config = CONFIGS[model]
    levels = len(config["block_out_channels"])
    channels = {"block_out_channels": SMALL["block_out_channels"][:levels]}
    return {**config, **SMALL, **channels} if small else config
