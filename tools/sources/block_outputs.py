"""What blocks compute at every step of one image, in the source model without caching."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from blockcache.export.measure.calibration import Calibration
from blockcache.export.measure.sampling import Sampling
from blockcache.export.unet.model import SourceModel
from blockcache.runtime import Preset, SolverConfig


def block_outputs(
    model: SourceModel,
    preset: Preset,
    calibration: Calibration,
    blocks: Sequence[int],
    seed: int = 0,
) -> dict[int, np.ndarray]:
    """The outputs C_k of some blocks on the first prompt, its conditional half.

    Args:
        model: the source model, float32.
        preset: solver, steps and guidance; its schedule is not used.
        calibration: prompts; the first is drawn.
        blocks: indices k.
        seed: of the noise.

    Returns:
        By block, float32 [S, C_k, h, w].
    """
    solver = SolverConfig.from_json(preset.solver)
    sampling = Sampling(model, solver, calibration, preset.guidance_scale)
    found: dict[int, list[np.ndarray]] = {k: [] for k in blocks}
    with sampling.cached_unet() as cached:
        denoiser, noise = sampling.begin(cached, [(0, seed)])
        for state in denoiser.trajectory(noise, sampling.uncached):
            for k, outputs in found.items():
                outputs.append(state.kept[k][0][-1].cpu().numpy())
    return {k: np.stack(outputs) for k, outputs in found.items()}
