"""One evaluation of the U-Net: conditions in once, then the segments that the schedule names."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter_ns

import numpy as np

from blockcache.runtime.devices.device import Device
from blockcache.runtime.program import Program, Run
from blockcache.runtime.record import RunRecord


def take_conditions(
    device: Device, program: Program, conditions: Mapping[str, np.ndarray], record: RunRecord
) -> None:
    """Put a request's conditions in place and run what depends on them alone.

    Args:
        device: where the program's tensors lie.
        program: of the conditions' sizes.
        conditions: by name [batch, ...]; the program keeps them, so nobody may write to them.
        record: gets the time that the prompt segment took.
    """
    program.conditions = None  # until all of it has run
    for name, values in conditions.items():
        device.upload(program.tensors[name], values)
    begin = perf_counter_ns()
    for launch in program.prompt:
        launch()
    record.prompt_ns = perf_counter_ns() - begin
    program.conditions = conditions


def evaluate(run: Run, step: int, record: RunRecord) -> None:
    """Compute the model output of one step: a reused block is simply not among the launches."""
    run.load_row(step)
    ran, durations = record.ran[step], record.segment_ns[step]
    for index, launch in run.launches[step]:
        begin = perf_counter_ns()
        launch()
        durations[index] = perf_counter_ns() - begin
        ran[index] = True
