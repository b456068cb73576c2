"""A bundle that is only a list of presets, and a subject of random prompts."""

from __future__ import annotations

import numpy as np
import pytest

from blockcache.runtime import Alignment, Preset, Schedule
from blockcache.runtime.plan import Dim, Segment, TensorSpec
from blockcache.runtime.provenance import Provenance
from blockcache.tools.evaluation.subject import Subject


def make_preset(name, steps, recompute=None, solver="dpm", **policy):
    """A preset of two blocks; ``recompute`` bool [S, 2], default everywhere."""
    table = np.ones((steps, 2), np.bool_) if recompute is None else np.asarray(recompute)
    return Preset(
        name=name,
        solver={"solver": solver, "steps": steps},
        schedule=Schedule(table),
        alignment=Alignment.identity(steps, (3, 3)),
        time_tables={},
        provenance=Provenance(**(policy or {"kind": "uncached"})),
    )


def make_segment(name, role, reads, writes, flops, block=None):
    """A segment that hands single numbers on."""
    inputs, outputs = (
        tuple(TensorSpec(tensor, "float32", (Dim.parse(1),)) for tensor in names.split())
        for names in (reads, writes)
    )
    return Segment(name, role, f"{name}.onnx", inputs, outputs, block, flops)


class PresetsOnly:
    """Segments with FLOPs, and presets: what groups are made from."""

    def __init__(self, presets):
        self._presets = {preset.name: preset for preset in presets}
        self.segments = [
            make_segment("prompt", "prompt", "encoder_hidden_states", "prompt_0", 7),
            make_segment("trunk_00", "trunk", "sample", "trunk_0_0", 60),
            make_segment("block_00", "block", "trunk_0_0", "block_0", 30, block=0),
            make_segment("block_01", "block", "trunk_0_0", "block_1", 70, block=1),
            make_segment("trunk_01", "trunk", "trunk_0_0 block_0 block_1", "model_output", 40),
        ]

    @property
    def preset_names(self):
        return tuple(self._presets)

    def preset(self, name):
        return self._presets[name]


@pytest.fixture
def preset_of():
    """``preset_of(name, steps, recompute=None, solver="dpm", **policy)``."""
    return make_preset


@pytest.fixture
def presets_only():
    """``presets_only(presets)`` stands for a bundle."""
    return PresetsOnly


@pytest.fixture
def subject_of():
    """``subject_of(model, conditions_of, images)``: random prompts, no decoder."""

    def make(model, conditions_of, images, **more):
        return Subject(
            captions=("a", "b", "c"),
            prompts=np.arange(images) % 3,
            positive=conditions_of(model, 3),
            negative=conditions_of(model, 1, seed=1),
            about="three random prompts",
            **more,
        )

    return make
