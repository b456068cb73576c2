"""Text encoders and autoencoders of full size with random weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockcache.export import Parts
    from blockcache.export.parts.part import Part

CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
TOKENS = 77


def random_parts(model: str) -> Parts:
    """Of ``sd15``: CLIP-L and an AutoencoderKL; of ``sdxl``: CLIP-G, too."""
    from blockcache.export import Parts
    from blockcache.export.parts.load import autoencoder_parts

    large = model == "sdxl"
    encoders = [_text_encoder("text_encoder", "CLIPTextModel", CLIP_L, penultimate=large)]
    if large:
        kind = "CLIPTextModelWithProjection"
        encoders.append(_text_encoder("text_encoder_2", kind, CLIP_G, penultimate=True))
    vae = autoencoder_parts(_vae, sha256="random", channels=4, factor=8, single=large)
    return Parts(parts=(*encoders, *vae), zeros_without_negative=large)


def _text_encoder(name: str, kind: str, config: dict[str, Any], *, penultimate: bool) -> Part:
    from blockcache.export.parts.part import Part
    from blockcache.export.parts.text_encoders import ClipStates

    pooled = kind.endswith("Projection")
    outputs: dict[str, tuple[str | int, ...]] = {"states": ("batch", TOKENS, config["hidden_size"])}
    if pooled:
        outputs["pooled"] = ("batch", config["projection_dim"])

    def load(dtype: Any) -> Any:
        import transformers

        with _made_in(dtype):
            made = getattr(transformers, kind)(transformers.CLIPTextConfig(**config))
        return ClipStates(made, skip=0 if penultimate else None, pooled=pooled)

    return Part(
        name=name,
        role="text_encoder",
        sha256=f"random {name}",
        load=load,
        inputs={"input_ids": ("batch", TOKENS)},
        outputs=outputs,
        tokenizer=_tokenizer(),
    )


def _vae(dtype: Any) -> Any:
    from diffusers import AutoencoderKL

    with _made_in(dtype):
        return AutoencoderKL(**VAE)


@contextlib.contextmanager
def _made_in(dtype: Any) -> Iterator[None]:
    """Weights are made in a dtype from the start: float32 would double the memory."""
    import torch

    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def _tokenizer() -> str:
    """One that knows no word: speed and memory of the parts do not depend on it."""
    from tokenizers import Tokenizer, models

    made = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    made.enable_truncation(TOKENS)
    made.enable_padding(length=TOKENS, pad_id=0, pad_token="?")
    return str(made.to_str())
