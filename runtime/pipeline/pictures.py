"""Latents to pictures and back: the autoencoder's two halves, on whole images or in tiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from blockcache.runtime.devices.tensor import Tensor
from blockcache.runtime.errors import InputError
from blockcache.runtime.pipeline.bound_part import BoundPart
from blockcache.runtime.plan import ModelFacts, Sizes

OVERLAP = 4
"""Neighbouring tiles share a quarter of their side, as in diffusers."""


class PictureDecoder:
    """The decoder, on whole latents or in tiles."""

    def __init__(self, model: ModelFacts, decoder: BoundPart) -> None:
        self._sizes = model.sizes
        self._decoder = decoder
        self.factor = int(decoder.part.outputs[0].dims[-1].coefficient)

    def images(self, latents: np.ndarray | Tensor, tile: int | None = None) -> np.ndarray:
        """Pictures uint8 [N, H, W, 3] of latents float32 [N, C, h, w], decoded together.

        Args:
            latents: as the loop leaves them, on the host or on the device.
            tile: the side of a tile in latents; None decodes pictures as a whole.
        """
        if tile is None or tile >= max(latents.shape[2:]):
            pixels = self._decode(latents, slice(None), slice(None))
        else:
            pixels = self._in_tiles(latents, tile)
        scaled = (pixels * 255).round().astype(np.uint8)
        return np.ascontiguousarray(scaled.transpose(0, 2, 3, 1))

    def _decode(self, latents: np.ndarray | Tensor, rows: slice, columns: slice) -> np.ndarray:
        """float32 [N, 3, H, W] in 0..1 of a rectangle."""
        high, wide = (
            len(range(size)[span])
            for size, span in zip(latents.shape[2:], (rows, columns), strict=True)
        )
        given = (
            latents.window(rows, columns)
            if isinstance(latents, Tensor)
            else np.ascontiguousarray(latents[..., rows, columns])
        )
        sizes = replace(self._sizes, batch=latents.shape[0], height=high, width=wide)
        image: np.ndarray = self._decoder(sizes, {"latents": given})["image"]
        return image

    def _in_tiles(self, latents: np.ndarray | Tensor, tile: int) -> np.ndarray:
        """Tiles of one size, faded into each other where they overlap."""
        count, _, height, width = latents.shape
        factor = self.factor
        total = np.zeros((count, 3, height * factor, width * factor), np.float32)
        weight = np.zeros(total.shape[2:], np.float32)
        for rows in _spans(height, tile):
            for columns in _spans(width, tile):
                part = self._decode(latents, rows, columns)
                fade = np.outer(_ramp(part.shape[2]), _ramp(part.shape[3]))
                high, wide = (slice(s.start * factor, s.stop * factor) for s in (rows, columns))
                total[..., high, wide] += part * fade
                weight[high, wide] += fade
        return total / weight


class PictureEncoder:
    """The encoder, for image to image and for pictures that a U-Net reads."""

    def __init__(self, model: ModelFacts, encoder: BoundPart) -> None:
        self._sizes = replace(model.sizes, batch=1)
        self._encoder = encoder
        self.factor = int(encoder.part.inputs[0].dims[-1].coefficient)

    def latents(self, images: np.ndarray, kept: np.ndarray | None = None) -> np.ndarray:
        """float32 [N, C, h, w] of pictures uint8 [N, H, W, 3]; grey where ``kept`` is False.

        ``kept`` is bool [N, H, W]; one picture serves several, and one of ``kept`` as well.
        """
        height, width = (side // self.factor for side in images.shape[1:3])
        sizes: Sizes = replace(self._sizes, height=height, width=width)
        signed = images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
        if kept is not None:
            signed = signed * kept[:, None].astype(np.float32)
        made = [self._encoder(sizes, {"image": image[None]})["latents"] for image in signed]
        return np.concatenate(made)


def as_pictures(image: object, name: str = "image") -> np.ndarray:
    """Pictures uint8 [N, H, W, 3] of one or several, numpy's or Pillow's; ``name`` is for errors.

    Raises:
        InputError: anything else.
    """
    several = isinstance(image, list | tuple)
    arrays = [np.asarray(each) for each in image] if several else [np.asarray(image)]  # type: ignore[attr-defined]
    shapes = {array.shape for array in arrays}
    found = np.stack(arrays) if len(shapes) == 1 and several else arrays[0]
    found = found[None] if found.ndim == 3 else found
    if len(shapes) != 1 or found.ndim != 4 or found.shape[3] != 3 or found.dtype != np.uint8:
        raise InputError(
            f"{name}: expected uint8 [N, H, W, 3], or pictures of one size in RGB, got "
            f"{arrays[0].dtype} of shapes {sorted(shapes)}."
        )
    return found


def _spans(side: int, tile: int) -> Iterator[slice]:
    """Spans of ``tile`` that cover ``side``, each over the end of the one before."""
    tile = min(tile, side)
    step = max(1, tile - tile // OVERLAP)
    starts = [*range(0, side - tile, step), side - tile]
    return (slice(start, start + tile) for start in starts)


def _ramp(side: int) -> np.ndarray:
    """Weights that rise from both ends over the overlap; nowhere zero."""
    distance = np.minimum(np.arange(side), np.arange(side)[::-1]) + 1
    rise: np.ndarray = np.minimum(distance / max(1, side // OVERLAP), 1).astype(np.float32)
    return rise
