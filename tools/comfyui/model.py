"""A bundle where ComfyUI calls a U-Net: model outputs by the preset's schedule.

ComfyUI puts prompts into batches as it likes: both guided halves in one, or one after the other,
and more where areas or ranges of steps have prompts of their own. Each batch of prompts is a *lane*
with a session of its own, so that what it reuses is its own; engines are shared.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from blockcache.runtime import Bundle, InputError, Session, UnsupportedModelError
from blockcache.runtime.open_request import OpenRequest
from blockcache.runtime.solvers.recorded import recorded_solver
from blockcache.runtime.solvers.solver import SolverConfig, solver_tables

TOLERANCE = 2e-3
"""By how much a sigma may differ from the preset's, relative: ComfyUI may not round timesteps."""

_UNUSED = ("crossattn_controlnet",)
"""What ComfyUI passes along and what only a ControlNet reads."""


@dataclass
class _Lane:
    """Rows that go through the steps together."""

    session: Session
    request: OpenRequest
    step: int  # the last that was predicted


class BundleModel:
    """What ComfyUI calls ``diffusion_model``.

    Args:
        bundle: an opened bundle.
        preset: one of its presets; None for the recommended one.
        options: as for ``Session.open``.

    Raises:
        ConfigError: the preset runs a scheduler of diffusers.
        BundleError, EngineError: see ``Session.open``.
    """

    dtype = torch.float32
    """What ComfyUI casts inputs to: SDXL's sizes stand among them, whole numbers of thousands."""

    def __init__(self, bundle: Bundle, preset: str | None = None, **options: Any) -> None:
        self._open: Callable[[], Session] = lambda: Session.open(bundle, preset=preset, **options)
        first = self._open()
        levels = first.sigmas  # refuses presets that have none
        config = recorded_solver(first.preset.solver)
        assert isinstance(config, SolverConfig)
        self.solver, self.preset = config, first.preset.name
        self.sigmas = np.append(levels, solver_tables(config).final_sigma)  # [S + 1]
        self._specs = {spec.name: spec for spec in bundle.model.conditions}
        self._precision = getattr(torch, bundle.model.precision)
        self._idle = [first]
        self._lanes: dict[Hashable, _Lane] = {}

    @property
    def micro_conditions(self) -> int:
        """How many sizes SDXL (6) or its refiner (5) are told; 0 for other models."""
        spec = self._specs.get("time_ids")
        return 0 if spec is None else int(spec.dims[-1].coefficient)

    def __call__(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        y: torch.Tensor | None = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """One evaluation, with the arguments of ComfyUI's ``UNetModel.forward``.

        The step is found by its sigma; ``timesteps``, which ComfyUI rounds, is not read.

        Raises:
            UnsupportedModelError: something that the bundle has no place for.
            InputError: a sigma that is none of the preset's, or a sampler that evaluates twice.
        """
        given = dict(transformer_options or {})
        refuse_what_would_be_lost(control, given, others)
        step = self._step(float(given["sigmas"].flatten()[0]))
        lane = self._lane((tuple(given["uuids"]), tuple(x.shape)), step, x, context, y)
        lane.step = step
        return _to_torch(lane.request.predict(step, self._to_session(x)), x)

    def during(
        self, executor: Any, guider: Any, sigmas: torch.Tensor, *more: Any, **named: Any
    ) -> Any:
        """One sampling, as a wrapper of ComfyUI's ``Sampler.sample``: checked, then ended.

        Raises:
            InputError: its sigmas are not the preset's.
        """
        self.check(sigmas)
        self.end()
        try:
            return executor(guider, sigmas, *more, **named)
        finally:
            self.end()

    def check(self, sigmas: torch.Tensor) -> None:
        """InputError unless they are the preset's noise levels, or follow each other there."""
        asked = sigmas.double().cpu().numpy()
        first = int(np.argmin(np.abs(self.sigmas - asked[:1]))) if len(asked) else 0
        mine = self.sigmas[first : first + len(asked)]
        if mine.shape != asked.shape or not np.allclose(mine, asked, rtol=TOLERANCE, atol=1e-6):
            raise InputError(
                f"sigmas: expected the {len(self.sigmas)} of preset {self.preset!r} "
                f"({_few(self.sigmas)}) or a part of them, got {len(asked)} ({_few(asked)}). "
                f"Connect the SIGMAS of this loader to SamplerCustom, or name a scheduler and a "
                f"number of steps that visit these levels."
            )

    def end(self) -> None:
        """Let go of what belongs to one sampling."""
        for lane in self._lanes.values():
            lane.request.end()
            self._idle.append(lane.session)
        self._lanes.clear()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the weights are the engines'."""
        return {}

    # -- lanes -------------------------------------------------------------------------------------

    def _step(self, sigma: float) -> int:
        levels = self.sigmas[:-1]
        step = int(np.argmin(np.abs(levels - sigma)))
        if not np.isclose(levels[step], sigma, rtol=TOLERANCE):
            raise InputError(
                f"sigma: expected one of preset {self.preset!r} ({_few(levels)}), got {sigma:g}. "
                f"The sampler evaluates the model between its steps: take one that does not, such "
                f"as the SAMPLER of this loader."
            )
        return step

    def _lane(
        self,
        key: Hashable,
        step: int,
        x: torch.Tensor,
        context: Any,
        y: torch.Tensor | None,
    ) -> _Lane:
        """The lane that goes on with this step, or another that begins here."""
        lane = self._lanes.get(key)
        if lane is not None and lane.step == step - 1:
            return lane
        if lane is not None and lane.step >= step:
            raise InputError(
                f"step: expected {lane.step + 1}, which follows step {lane.step}, got {step}. The "
                f"sampler evaluates the model more than once a step: take one that does not, such "
                f"as the SAMPLER of this loader."
            )
        if lane is not None:  # its prompts were in other batches meanwhile
            lane.request.end()
            self._idle.append(self._lanes.pop(key).session)
        session = self._idle.pop() if self._idle else self._open()
        request = session.begin(
            context.detach(), conditions=self._conditions(y), batch=len(x), height=x.shape[2],
            width=x.shape[3],
        )  # fmt: skip
        made = self._lanes[key] = _Lane(session, request, step)
        return made

    def _conditions(self, y: torch.Tensor | None) -> dict[str, Any]:
        """SDXL's, from ComfyUI's one tensor: the pooled prompt, and behind it the sizes."""
        count = self.micro_conditions
        if y is None or not count:
            return {} if y is None else {"y": y}  # refused by name
        return {"text_embeds": y[:, :-count].detach(), "time_ids": y[:, -count:].detach()}

    def _to_session(self, x: torch.Tensor) -> torch.Tensor:
        """On a GPU in the bundle's own dtype, so that it is copied as it is."""
        x = x.detach().contiguous()
        return x.to(self._precision) if x.is_cuda else x


def refuse_what_would_be_lost(
    control: Any, options: Mapping[str, Any], others: Mapping[str, Any]
) -> None:
    """UnsupportedModelError, by name, for what changes a U-Net of ComfyUI from within."""
    found = ["a ControlNet"] if control is not None else []
    patches = [name for name, values in options.get("patches", {}).items() if values]
    patches += [name for name, values in options.get("patches_replace", {}).items() if values]
    found += [f"patches of the U-Net ({', '.join(patches)})"] if patches else []
    wrappers = options.get("wrappers", {}).get("diffusion_model", {})
    found += [f"wrappers of the U-Net ({', '.join(map(str, wrappers))})"] if wrappers else []
    found += [name for name, value in others.items() if value is not None and name not in _UNUSED]
    if found:
        raise UnsupportedModelError(
            f"Expected a workflow that leaves the U-Net as it was compiled, got {', '.join(found)}."
            f" They would have no effect: take them out, or load the model's own checkpoint."
        )


def _to_torch(output: Any, like: torch.Tensor) -> torch.Tensor:
    """A tensor of its own, typed and placed as the sample."""
    if isinstance(output, np.ndarray):
        return torch.from_numpy(output).to(like.device, like.dtype)
    return torch.utils.dlpack.from_dlpack(output).clone().to(like.dtype)


def _few(values: np.ndarray) -> str:
    return ", ".join(f"{value:.4g}" for value in values[:3]) + f", ..., {values[-1]:.4g}"
