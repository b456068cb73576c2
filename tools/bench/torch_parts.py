"""Text encoders and decoder in PyTorch, as a diffusers pipeline runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from blockcache.export import Parts
from blockcache.export.parts.part import Part
from blockcache.runtime import ConfigError
from blockcache.runtime.pipeline.tokenizer import TextTokenizer
from blockcache.tools.bench.contestants import Contestant, Entry
from blockcache.tools.bench.pictures import fresh_prompts, part_contestant
from blockcache.tools.bench.random_parts import random_parts
from blockcache.tools.bench.random_unet import CONFIGS
from blockcache.tools.bench.torch_loop import TorchLoop
from blockcache.tools.sources.models import load_parts_of


def torch_parts(loop: TorchLoop, model: str) -> Iterator[Entry]:
    """Both, for the pictures of a loop.

    Args:
        loop: whose device, dtype and latents they take.
        model: as ``open_loop`` takes it.
    """

    def parts() -> Parts:
        return random_parts(model) if model in CONFIGS else load_parts_of(model)

    yield Entry("torch text", partial(_text, loop, parts))
    yield Entry("torch decoding", partial(_decoding, loop, parts))


def _text(loop: TorchLoop, parts: Callable[[], Parts]) -> Contestant:
    """Prompts, and as many empty negative prompts, in one batch."""
    encoders = [_Encoder(part, loop) for part in _of_role(parts(), "text_encoder")]
    prompts = fresh_prompts(loop.images)

    def run() -> None:
        texts = [*[""] * loop.images, *prompts()]
        for encode in encoders:
            encode(texts)

    return part_contestant("torch", "text", loop.images, run)


class _Encoder:
    """A text encoder with its tokenizer."""

    def __init__(self, part: Part, loop: TorchLoop) -> None:
        length = int(part.inputs["input_ids"][1])
        self._tokenizer = TextTokenizer(part.name, part.tokenizer.encode(), length)
        self._model = _loaded(part, loop)
        self._device = loop.device
        self._inputs = tuple(part.inputs)

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> None:
        tokens = [self._tokenizer(text) for text in texts]
        ids = np.concatenate([each.ids[:1] for each in tokens])
        mask = np.concatenate([each.mask[:1] for each in tokens])
        given = {"input_ids": ids, "attention_mask": mask}
        self._model(*(torch.from_numpy(given[name]).to(self._device) for name in self._inputs))
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def _decoding(loop: TorchLoop, parts: Callable[[], Parts]) -> Contestant:
    """All pictures in one batch."""
    decoder = _loaded(_of_role(parts(), "decoder")[0], loop)
    latents = torch.zeros_like(loop.noise)

    @torch.inference_mode()
    def run() -> None:
        (decoder(latents) * 255).round().to(torch.uint8).cpu()

    return part_contestant("torch", "decoding", loop.images, run)


def _of_role(parts: Parts, role: str) -> list[Part]:
    """Those of a role; ConfigError where there is none."""
    found = [part for part in parts.parts if part.role == role]
    if not found:
        refused = "; ".join(parts.refused.values())
        raise ConfigError(f"Expected a model with a {role}, this one has none. {refused}".strip())
    return found


def _loaded(part: Part, loop: TorchLoop) -> torch.nn.Module:
    """On the loop's device, in its dtype."""
    dtype = torch.float32 if part.single and loop.dtype == torch.float16 else loop.dtype
    return part.load(dtype).to(loop.device).eval()
