"""What the steps of each preset need: which segments run, and the rows that they read.

A row of every preset and step lies in one table a tensor, so that images at different steps, also
of different presets, gather theirs by a number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from blockcache.runtime.devices.host import HostDevice
from blockcache.runtime.devices.tensor import Tensor, encode
from blockcache.runtime.errors import ConfigError
from blockcache.runtime.plan import Preset, Segment, Sizes, TensorSpec, coefficient_names
from blockcache.runtime.run_table import run_table
from blockcache.runtime.solvers.recorded import DiffusersScheduler, recorded_solver
from blockcache.runtime.solvers.solver import SolverTables, solver_tables


@dataclass(frozen=True, eq=False)
class Way:
    """A preset from one first step on."""

    first: int
    runs: np.ndarray  # bool [S, M], which segments run; nothing before the first step
    fields: Mapping[str, np.ndarray]  # by row field: int64 [S], the row of its table to read
    coefficients: np.ndarray  # float32 [S, 8], of the solver


class PresetTables:
    """The tables of some presets of a bundle, side by side.

    Args:
        presets: by name; their solvers are the runtime's own.
        loop: segments of the loop, in the order in which they run.
        rows: fields of the step's row.
        device: where the tables lie.
        sizes: of one image's row.

    Raises:
        ConfigError: a preset runs a scheduler of diffusers.
    """

    def __init__(
        self,
        presets: Iterable[Preset],
        loop: Sequence[Segment],
        rows: Sequence[TensorSpec],
        device: HostDevice,
        sizes: Sizes,
    ) -> None:
        self._loop = loop
        self.presets = {preset.name: preset for preset in presets}
        self.solvers = {name: _tables(preset) for name, preset in self.presets.items()}
        counts = [preset.schedule.steps for preset in self.presets.values()]
        self._begins = dict(zip(self.presets, np.cumsum([0, *counts]).tolist(), strict=False))
        self._fresh = sum(counts)  # behind all steps: coefficients that leave an output as it is
        self._coefficients = {
            name: (k, place)
            for preset in self.presets.values()
            for k in range(preset.schedule.blocks)
            for place, name in enumerate(coefficient_names(k, preset.alignment.outputs))
        }
        self.fields = {spec.name: self._field(spec, device, sizes) for spec in rows}
        self.bytes = sum(tensor.bytes for tensor in self.fields.values())
        self._ways: dict[tuple[str, int], Way] = {}

    def way(self, name: str, first: int) -> Way:
        """The preset ``name`` from its step ``first`` on; kept once made."""
        if (name, first) not in self._ways:
            schedule, begin = self.presets[name].schedule, self._begins[name]
            runs = np.zeros((schedule.steps, len(self._loop)), np.bool_)
            runs[first:] = run_table(self._loop, schedule.started_at(first))
            steps = np.arange(begin, begin + schedule.steps)
            aligned = steps.copy()
            aligned[first] = self._fresh  # the first executed step uses fresh outputs as they are
            self._ways[name, first] = Way(
                first,
                runs,
                {f: aligned if f in self._coefficients else steps for f in self.fields},
                self.solvers[name].rows_from(first),
            )
        return self._ways[name, first]

    def _field(self, spec: TensorSpec, device: HostDevice, sizes: Sizes) -> Tensor:
        """One field's rows of all presets and steps, and one more: [rows, ...]."""
        parts = [self._values(spec.name, preset) for preset in self.presets.values()]
        fresh = np.zeros_like(parts[0][:1])
        if spec.name in self._coefficients and self._coefficients[spec.name][1] == 0:
            fresh += 1  # the scale
        content = encode(np.concatenate([*parts, fresh]), spec.dtype)
        memory = device.allocate(content.nbytes)
        device.upload(device.tensor(memory, 0, content.shape, "uint8"), content)
        shape = (len(content), *spec.shape(sizes)[1:])
        return device.tensor(memory, 0, shape, spec.dtype)

    def _values(self, name: str, preset: Preset) -> np.ndarray:
        """A field's numbers at every step, float32 [S, n]."""
        if name in self._coefficients:
            k, place = self._coefficients[name]
            return preset.alignment.tables[k][:, place]
        return preset.time_tables[name].reshape(preset.schedule.steps, -1)


def _tables(preset: Preset) -> SolverTables:
    config = recorded_solver(preset.solver)
    if isinstance(config, DiffusersScheduler):
        raise ConfigError(
            f"Expected presets with a solver of the runtime, {preset.name!r} runs "
            f"{config.scheduler} of diffusers. Leave it out of presets."
        )
    return solver_tables(config)
