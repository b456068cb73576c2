"""The U-Net and its noise schedule, as diffusers knows them."""

from __future__ import annotations

from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn

from blockcache.tools.demo.config import LATENT_CHANNELS, TEXT_CHANNELS, TIMESTEPS, UNetConfig

SCHEDULE = {
    "num_train_timesteps": TIMESTEPS,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
}


def build(config: UNetConfig, latent_size: int) -> UNet2DConditionModel:
    """A U-Net with fresh weights and spatial transformers on every level."""
    levels = len(config.channels)
    model = UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=config.layers_per_block,
        block_out_channels=config.channels,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        transformer_layers_per_block=config.transformer_layers,
        attention_head_dim=tuple(c // config.head_channels for c in config.channels),
        norm_num_groups=config.norm_groups,
        cross_attention_dim=TEXT_CHANNELS,
    )
    silence(model)
    return model


def silence(model: nn.Module) -> None:
    """Zero the last layer of every residual branch and of the model: training starts calmer."""
    for name, module in model.named_modules():
        if name.endswith((".conv2", ".proj_out")) or name == "conv_out":
            for parameter in module.parameters(recurse=False):
                nn.init.zeros_(parameter)


def noise_schedule() -> DDPMScheduler:
    """The training noise schedule."""
    return DDPMScheduler(**SCHEDULE)
