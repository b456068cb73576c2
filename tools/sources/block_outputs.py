"""What blocks compute at every step of one image, in the source model without caching."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from blockcache.export.measure.calibration import Calibration
from blockcache.export.unet.cached_unet import CachedUNet, denoise
from blockcache.export.unet.model import SourceModel
from blockcache.runtime import Preset, Schedule, SolverConfig
from blockcache.runtime.solver import solver_tables


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
    tables = solver_tables(SolverConfig.from_json(preset.solver))
    schedule = Schedule.uncached(preset.schedule.steps, len(model.blocks))
    shape = (1, int(model.unet.config.in_channels), *model.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    guidance = preset.guidance_scale
    conditions = calibration.pick([0], guidance != 1.0)
    found: dict[int, list[np.ndarray]] = {k: [] for k in blocks}
    with CachedUNet(model) as cached:

        def after_step(step: int) -> None:
            for k, outputs in found.items():
                outputs.append(cached.blocks[k].history[0][-1].numpy().copy())

        denoise(cached, tables, schedule, None, noise, conditions, guidance, after_step)
    return {k: np.stack(outputs) for k, outputs in found.items()}
