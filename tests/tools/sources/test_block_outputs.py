"""Outputs of blocks over an uncached run."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from blockcache.export.measure.calibration import Calibration
from blockcache.export.measure.sampling import Sampling
from blockcache.runtime import SolverConfig
from blockcache.tools.sources.block_outputs import block_outputs


def test_block_outputs_are_what_blocks_add_to_their_input(tiny_models, conditions_of):
    model = tiny_models("sd")
    calibration = Calibration(conditions_of(model, 2), conditions_of(model, 1, seed=1))
    sampling = Sampling(model, SolverConfig(solver="ddim", steps=4), calibration, 2.0)
    seen = []
    handle = model.unet.get_submodule(model.blocks[2].path).register_forward_hook(
        lambda _module, inputs, output: seen.append(output[0] - inputs[0])
    )
    try:
        found = block_outputs(sampling, [(0, 7), (1, 8), (0, 9)], [2])
    finally:
        handle.remove()
    assert list(found) == [2]
    assert found[2].shape == (4, 6, model.blocks[2].channels, 4, 4)
    np.testing.assert_allclose(found[2], np.stack([output.numpy() for output in seen]), atol=1e-6)
    assert not np.array_equal(found[2][:, 3], found[2][:, 4])  # another prompt, other noise
