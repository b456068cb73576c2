"""A trial: where a preset's run ends, from noise that calibrated nothing, and how far that is.

Candidates of a joint preset are compared by it (see ``choose/joint.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from blockcache.export.measure.sampling import Sampling
from blockcache.export.observer import Observer, unobserved
from blockcache.runtime.errors import ConfigError
from blockcache.runtime.plan import Alignment, Schedule


@dataclass(frozen=True, kw_only=True)
class TrialOptions:
    """On what candidates are compared."""

    images: int = 16
    seed: int = 900_001  # of the noise; no calibration takes it

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ConfigError(f"Expected at least one image to compare on, got {self.images}.")


def trial_latents(
    sampling: Sampling,
    schedule: Schedule,
    alignment: Alignment | None,
    options: TrialOptions,
    *,
    observer: Observer = unobserved,
) -> np.ndarray:
    """Where a candidate ends, or the uncached run: float32 [N, C, H, W].

    Args:
        sampling: what to run; the images' prompts are spread evenly over its own.
        schedule: of the candidate.
        alignment: of the candidate; None: outputs are reused as they are.
        options: how many images, of which noise.
        observer: hears the steps done, stage "try".
    """
    prompts = sampling.spread_prompts(options.images)
    jobs = [(prompt, options.seed + image) for image, prompt in enumerate(prompts)]
    with sampling.cached_unet(1 if alignment is None else alignment.outputs) as cached:
        denoiser, noise = sampling.begin(cached, jobs)
        latents = noise
        for step, state in enumerate(denoiser.trajectory(noise, schedule, alignment)):
            latents = state.latents
            observer("try", step + 1, schedule.steps)
    return latents.cpu().numpy()


def mean_distance(latents: np.ndarray, reference: np.ndarray) -> float:
    """Mean over images of |latents - reference| / |reference|."""
    ours, full = (x.reshape(len(x), -1).astype(np.float64) for x in (latents, reference))
    return float((np.linalg.norm(ours - full, axis=1) / np.linalg.norm(full, axis=1)).mean())
