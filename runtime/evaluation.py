"""One evaluation of the U-Net: conditions in once, then the segments that the schedule names."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter_ns

import numpy as np

from blockcache.runtime.devices.device import Device
from blockcache.runtime.devices.dlpack import Lent
from blockcache.runtime.devices.tensor import Tensor
from blockcache.runtime.program import Program, Run
from blockcache.runtime.record import RunRecord
from blockcache.runtime.request import Condition


def take_conditions(
    device: Device, program: Program, conditions: Mapping[str, Condition], record: RunRecord
) -> None:
    """Put a request's conditions in place and run what depends on them alone.

    Args:
        device: where the program's tensors lie.
        program: of the conditions' sizes.
        conditions: by name; the program keeps those of numpy, so nobody may write to them.
        record: gets the time that the prompt segment took.
    """
    program.conditions = None  # until all of it has run
    for name, values in conditions.items():
        put_condition(device, program.tensors[name], values)
    begin = perf_counter_ns()
    for launch in program.prompt:
        launch()
    record.prompt_ns = perf_counter_ns() - begin
    known = {n: values for n, values in conditions.items() if isinstance(values, np.ndarray)}
    if len(known) == len(conditions):
        program.conditions = known
    else:  # what was lent is not read any more
        device.synchronize()


def put_condition(device: Device, target: Tensor, values: Condition) -> None:
    """A condition to where the engines read it."""
    if isinstance(values, np.ndarray):
        device.upload(target, values)
        return
    count = target.shape[0] // len(values)
    for place, half in enumerate(values):
        part = target.along(place * count, count)
        if not isinstance(half, Lent):
            device.upload(part, half)
        elif half.shape[0] == count:
            device.copy_from(part, half.pointer)
        else:  # one serves all
            for row in range(count):
                device.copy_from(part.along(row, 1), half.pointer)


def evaluate(run: Run, step: int, record: RunRecord) -> None:
    """Compute the model output of one step: a reused block is simply not among the launches."""
    run.load_row(step)
    ran, durations = record.ran[step], record.segment_ns[step]
    for index, launch in run.launches[step]:
        begin = perf_counter_ns()
        launch()
        durations[index] = perf_counter_ns() - begin
        ran[index] = True
