"""What blocks compute at every step of an uncached run of the source model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from blockcache.export.measure.sampling import Sampling


def block_outputs(
    sampling: Sampling, jobs: Sequence[tuple[int, int]], blocks: Sequence[int]
) -> dict[int, np.ndarray]:
    """The outputs C_k of some blocks, before they are added to the trunk.

    Args:
        sampling: model, solver, prompts and guidance.
        jobs: (prompt, seed) of every image.
        blocks: indices k.

    Returns:
        By block, float32 [S, N, C_k, h, w]; with guidance [S, 2 N, C_k, h, w], the unconditional
        half first.
    """
    found: dict[int, list[np.ndarray]] = {k: [] for k in blocks}
    with sampling.cached_unet() as cached:
        denoiser, noise = sampling.begin(cached, jobs)
        for state in denoiser.trajectory(noise, sampling.uncached):
            for k, outputs in found.items():
                outputs.append(state.kept[k][0].float().cpu().numpy().copy())
    return {k: np.stack(outputs) for k, outputs in found.items()}
