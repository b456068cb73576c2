"""The parts of a pipeline beside its U-Net: text encoders, decoder and encoder, bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.engines.engine import Backend
from blockcache.runtime.engines.loading import load_engines
from blockcache.runtime.errors import ConfigError
from blockcache.runtime.pipeline.bound_part import BoundPart
from blockcache.runtime.pipeline.pictures import PictureDecoder, PictureEncoder
from blockcache.runtime.pipeline.prompts import Encoded, PromptEncoder
from blockcache.runtime.plan import CONTROL_SCALE, Segment

_SERVED = ("encoder_hidden_states", "text_embeds", "time_ids")
"""Conditions that follow from a prompt and a size."""

CONTROL = ("control_image", CONTROL_SCALE)
"""How the conditions of ControlNets begin."""


def bound_parts(
    backend: Backend, bundle: Bundle, parts: Sequence[Segment], plans: Bundle | None = None
) -> dict[str, BoundPart]:
    """Parts of a bundle, loaded, by name; where ``plans`` is given, its engines are refitted."""
    other = plans if plans is not bundle else None
    engines = load_engines(backend, bundle, parts, other)
    return {part.name: BoundPart(part, engines[part.name], backend) for part in parts}


def require_served(
    bundle: Bundle,
    besides: tuple[str, ...] = (),
    pictures: Mapping[tuple[str, ...], tuple[str, ...]] = MappingProxyType({(): ()}),
) -> None:
    """Raise ConfigError unless a bundle has parts for prompts, and needs no more than is given.

    Conditions that begin like one of ``besides`` may be needed, too, and extra inputs that are
    among ``pictures``: these are made of what a request brings, with the conditions named there.
    """
    pipeline = bundle.pipeline
    roles = [] if pipeline is None else [part.role for part in pipeline.parts]
    lacking = [role for role in ("text_encoder", "decoder") if role not in roles]
    if lacking:
        raise ConfigError(
            f"Expected a bundle with text encoder and decoder, {bundle.folder} has no "
            f"{' and no '.join(lacking)}. Compile the model again with all its parts, or use "
            f"Session, with prompts encoded and latents decoded by yourself."
        )
    made = pictures.get(bundle.model.extra_inputs, ())
    names = {spec.name for spec in bundle.model.conditions} - {*made}
    further = sorted(name for name in names if not name.startswith((*_SERVED, *besides)))
    if further:
        raise ConfigError(
            f"Expected a U-Net that draws from prompts alone, {bundle.model.name} takes {further}, "
            f"too. Use Session, which takes them as conditions."
        )


class PipelineParts:
    """What makes conditions of prompts, and pictures of latents.

    Not thread-safe, but prompts, decoder and encoder do not touch each other.

    Args:
        bundle: one that ``require_served`` takes.
        bound: all its parts, by name.

    Raises:
        ConfigError, BundleFormatError, MissingExtraError: see ``PromptEncoder``.
    """

    def __init__(self, bundle: Bundle, bound: Mapping[str, BoundPart]) -> None:
        model, pipeline = bundle.model, bundle.pipeline
        assert pipeline is not None
        encoders = [bound[part.name] for part in pipeline.of_role("text_encoder")]
        (decoder,) = pipeline.of_role("decoder")
        self.bound = dict(bound)
        self.prompts = PromptEncoder(model, encoders, bundle.tokenizers)
        self.decoder = PictureDecoder(model, bound[decoder.name])
        self.encoder = next(
            (PictureEncoder(model, bound[part.name]) for part in pipeline.of_role("encoder")), None
        )
        self._zeros = pipeline.zeros_without_negative
        self._noise_levels = pipeline.noise_levels
        widths = [c.dims[-1] for c in model.conditions if c.name == "time_ids"]
        self._time_ids = int(widths[0].coefficient) if widths else 0

    @classmethod
    def load(cls, backend: Backend, bundle: Bundle) -> PipelineParts:
        """All parts of a bundle, on a backend."""
        assert bundle.pipeline is not None
        return cls(bundle, bound_parts(backend, bundle, bundle.pipeline.parts))

    def encode(
        self, texts: Sequence[str], negatives: Sequence[str] | None, *, chunks: int = 1
    ) -> tuple[Encoded, Encoded]:
        """Both halves of guidance's batch, of as many tokens; None stands for no negative prompt.

        Raises:
            EngineError: the engine library failed.
        """
        positive = self.prompts(texts, chunks=chunks)
        if negatives is None and self._zeros:
            return positive, self.prompts.zeros(positive)
        return positive, self.prompts(negatives or [""], chunks=chunks)

    def conditions(self, text: Encoded, sizes: Sequence[int], score: float) -> dict[str, Any]:
        """What SDXL takes besides the prompt; nothing for others.

        Args:
            text: one half of guidance's batch.
            sizes: of ``micro_sizes``.
            score: aesthetic, which the refiner takes in the place of a target size.
        """
        found: dict[str, Any] = {}
        if text.pooled is not None:
            found["text_embeds"] = self.prompts.lent(text.pooled)
        if self._time_ids:  # six numbers; the refiner's five end in a score
            row = sizes if self._time_ids == len(sizes) else [*sizes[:4], score]
            found["time_ids"] = np.array([row], np.float32)
        return found

    def require_encoder(self) -> PictureEncoder:
        """The encoder; ConfigError where the bundle has none."""
        if self.encoder is None:
            raise ConfigError(
                "Expected a bundle with an encoder, for pictures that are given; this one has "
                "none. Compile the model again with all its parts."
            )
        return self.encoder

    def require_noise_levels(self) -> Sequence[float]:
        """How an upscaler's picture is noised; ConfigError where the bundle does not say."""
        if not self._noise_levels:
            raise ConfigError(
                "Expected a bundle with the noise levels of an upscaler's small picture; this one "
                "has none. Compile the pipeline again, with its low_res_scheduler."
            )
        return self._noise_levels

    def release(self) -> None:
        """Let go of all memory."""
        for part in self.bound.values():
            part.release()
