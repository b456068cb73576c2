"""A request whose loop is the caller's: model outputs, one step at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from blockcache.runtime.arguments import whole_number
from blockcache.runtime.devices.device import Device
from blockcache.runtime.devices.device_view import DeviceView
from blockcache.runtime.devices.graphs import LoopGraphs
from blockcache.runtime.devices.interop import place
from blockcache.runtime.errors import ConfigError, InputError
from blockcache.runtime.evaluation import evaluate
from blockcache.runtime.program import Program, Run
from blockcache.runtime.record import RunRecord


class OpenRequest:
    """What ``Session.begin`` returns: it predicts the model output of one step after the other.

    ::

        with session.begin(np.concatenate([negative_prompt_embeds, prompt_embeds])) as request:
            for step, timestep in enumerate(session.timesteps):
                output = request.predict(step, np.concatenate([latents, latents]))
                ...  # guidance and the solver are the caller's

    The first step that is predicted recomputes everything, whichever it is; from there the steps
    follow each other, because a reused output belongs to the step before. While a request is open
    its session takes no other one.
    """

    def __init__(
        self,
        device: Device,
        program: Program,
        steps: int,
        held: Callable[[], AbstractContextManager[None]],
        graphs_from: Callable[[int], LoopGraphs | None],
    ) -> None:
        self._device, self._program, self._steps = device, program, steps
        self._held, self._graphs_from = held, graphs_from
        self._run: Run | None = None
        self._graphs: LoopGraphs | None = None
        self._next = 0
        self.record = RunRecord(program.loop, range(steps))
        self.is_open = True

    def predict(self, step: int, sample: Any) -> np.ndarray | DeviceView:
        """The model output of one step.

        Args:
            step: 0 to S-1, as in ``session.timesteps``; after the first call the next one.
            sample: the model input [batch, C, height, width], scaled as the scheduler has it.
                float32 of numpy, or a tensor of another library. On a GPU it has the bundle's
                own dtype, and is copied without a detour through the host.

        Returns:
            The model output, shaped alike: a float32 copy; or, for a sample on the session's GPU,
            a view of it in place, which is valid until the next step is predicted.

        Raises:
            ConfigError: the request was ended, or its session closed.
            InputError: a sample of another shape or dtype; or a step out of order.
            EngineError: the engine library failed.
        """
        step = whole_number("step", step, 0, self._steps - 1)
        with self._held():
            if not self.is_open:
                raise ConfigError("Expected an open request, this one was ended. Begin another.")
            run = self._run_of(step)
            stays = place(self._device, "sample", self._program.tensors["sample"], sample)

            def do_step(step: int) -> None:
                evaluate(run, step, self.record)

            if self._graphs is None:
                do_step(step)
            else:
                self._graphs.play_step(step, do_step)
            self._next = step + 1
            output = self._program.tensors["model_output"]
            view = self._device.view(output) if stays else None
            return self._device.download(output) if view is None else view

    def end(self) -> None:
        """Let the session take another request. Ending twice is fine."""
        self.is_open = False

    def __enter__(self) -> OpenRequest:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def _run_of(self, step: int) -> Run:
        """The run that this step belongs to: it begins with the first step that is asked for."""
        if self._run is None:
            self._run = self._program.run_from(step)
            self._graphs = self._graphs_from(step)
            self._next = step
        if step != self._next:
            raise InputError(
                f"step: expected {self._next}, which follows step {self._next - 1}, got {step}. "
                f"What is reused comes from the step before; begin another request to start from "
                f"step {step}."
                if self._next < self._steps
                else f"step: expected no more after step {self._steps - 1}, the last, got {step}. "
                f"Begin another request."
            )
        return self._run
