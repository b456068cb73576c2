"""What a batched pipeline hands out: a future for each picture, the picture, and counters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from blockcache.runtime.batching.counters import BatchCounters
from blockcache.runtime.batching.outcome import RequestFuture


@dataclass(frozen=True)
class BatchedPicture:
    """A picture, and how it came about."""

    image: np.ndarray  # uint8 [H, W, 3]
    seed: int
    latents: np.ndarray  # float32 [1, C, h, w]
    truncated: str  # what of the prompt did not fit, "" where all did
    steps: int  # that were executed
    launches: int  # of the U-Net's segments, that it took part in
    text_ms: float  # in text encoders, and in the encoder of the image to start from
    denoising_ms: float  # from the slot that it got to its last step
    decode_ms: float  # in the decoder, together with others
    waiting_ms: float  # all else, from submit to the result

    def summary(self) -> dict[str, float | int]:
        """The figures people ask for first."""
        times = {
            "text_ms": self.text_ms,
            "waiting_ms": self.waiting_ms,
            "denoising_ms": self.denoising_ms,
            "decode_ms": self.decode_ms,
        }
        rounded = {name: round(value, 3) for name, value in times.items()}
        return {"seed": self.seed, "steps": self.steps, "launches": self.launches, **rounded}


class PictureFuture(RequestFuture[BatchedPicture]):
    """The picture to come of a request; ``cancel`` also ends one that runs already."""


@dataclass(frozen=True, kw_only=True)
class PipelineCounters:
    """A moment's figures; all but the first only rise. Seconds are of what finished.

    ``submitted = pending + finished + failed + cancelled + expired``.
    """

    pending: int  # not ended yet: waiting, denoised or decoded
    submitted: int
    finished: int
    failed: int
    cancelled: int
    expired: int  # past their deadline
    text_seconds: float
    waiting_seconds: float
    denoising_seconds: float
    decode_seconds: float  # what is decoded together counts for each
    decodes_of_images: Mapping[int, int]  # runs of the decoder by how many images shared them
    batch: BatchCounters  # of the denoising alone

    def to_json(self) -> dict[str, object]:
        """By name, as values that JSON has."""
        shared = {str(images): count for images, count in self.decodes_of_images.items()}
        return {**asdict(self), "decodes_of_images": shared, "batch": self.batch.to_json()}
