"""Tiny random pipelines, saved as folders; nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

TOKENS = 9
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _tokenizer(folder: Path) -> Any:
    """CLIP's, with letters for a vocabulary."""
    transformers = pytest.importorskip("transformers")
    words = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS)]
    vocabulary = {w: i for i, w in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS
    )


def _encoder(kind: str, tokenizer: Any, width: int, pooled: int = 16) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=pooled,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return getattr(transformers, kind)(config).eval()


def _vae() -> Any:
    """Pictures are four times as large as latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
    ).eval()


def _make(kind: str, unet: Any, folder: Path) -> Any:
    import diffusers

    tokenizer = _tokenizer(folder)
    shared = {
        "unet": unet,
        "vae": _vae(),
        "scheduler": diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
    }
    projecting = "CLIPTextModelWithProjection"
    if kind == "sd":
        return diffusers.StableDiffusionPipeline(
            **shared,
            text_encoder=_encoder("CLIPTextModel", tokenizer, 32),
            tokenizer=tokenizer,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    if kind == "refiner":
        return diffusers.StableDiffusionXLImg2ImgPipeline(
            **shared,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=_encoder(projecting, tokenizer, 32, pooled=32),
            tokenizer_2=tokenizer,
            requires_aesthetics_score=True,
            add_watermarker=False,
        )
    return diffusers.StableDiffusionXLPipeline(
        **shared,
        text_encoder=_encoder("CLIPTextModel", tokenizer, 16),
        tokenizer=tokenizer,
        text_encoder_2=_encoder(projecting, tokenizer, 16),
        tokenizer_2=tokenizer,
        force_zeros_for_empty_prompt=kind == "sdxl",
        add_watermarker=False,
    )


PIPELINES = {"sd": "sd", "sdxl": "sdxl", "sdxl-encodes-empty": "sdxl", "refiner": "refiner"}
"""The kind of the U-Net that each has."""


@pytest.fixture(scope="session")
def pipeline_folder(tiny_models: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``pipeline_folder(kind)`` gives the folder of a pipeline, saved once a kind."""
    torch = pytest.importorskip("torch")
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            torch.manual_seed(0)
            pipeline = _make(kind, tiny_models(PIPELINES[kind]).unet, folder / "tokenizer")
            pipeline.save_pretrained(folder / f"tiny-{kind}")
            made[kind] = folder / f"tiny-{kind}"
        return made[kind]

    return get
