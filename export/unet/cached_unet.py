"""The reference: a diffusers U-Net whose blocks can be reused, and a denoising loop over it.

It serves profiling, alignment and quality evaluation, and is the oracle of every engine test: same
schedule, same alignment, same noise, same latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch

from blockcache.export.unet.model import SourceModel, UNetCall
from blockcache.export.unet.torch_kernels import scale_shift_residual
from blockcache.runtime.plan import Alignment, Schedule
from blockcache.runtime.solver import SolverTables

OnReuse: TypeAlias = Callable[[int, torch.Tensor, Sequence[torch.Tensor]], torch.Tensor]
"""Called where block k is reused, with what it would compute, C [B, C, H, W], and the outputs that
it computed last; returns the coefficients to reuse them with, [2 or 3, C]."""


class CacheableBlock(torch.nn.Module):
    """Stands in for a spatial transformer: ``y = x + C``, where C may be an earlier output.

    Or for a ResBlock, whose x goes through a 1 x 1 convolution where the width changes.

    ``history`` holds the computed outputs C, the last one first; at most ``outputs`` of them.
    ``on_reuse`` is asked for the coefficients of a reuse where it is set.
    """

    def __init__(self, inner: torch.nn.Module, outputs: int) -> None:
        super().__init__()
        self.inner = inner
        self.outputs = outputs
        self.recompute = True
        self.coefficients: torch.Tensor | None = None  # [2 or 3, C_k], used where reused
        self.history: list[torch.Tensor] = []
        self.on_reuse: Callable[[torch.Tensor, Sequence[torch.Tensor]], torch.Tensor] | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The transformer itself at a recompute step, the aligned sum at a reuse step."""
        shortcut = getattr(self.inner, "conv_shortcut", None)
        residual = hidden_states if shortcut is None else shortcut(hidden_states)
        if self.recompute or self.on_reuse is not None:
            result = self.inner(hidden_states, *args, **kwargs)
            fresh = _tensor(result) - residual
            if self.recompute:
                self.history = [fresh, *self.history][: self.outputs]
                return result
            self.coefficients = self.on_reuse(fresh, self.history)  # type: ignore[misc]
        fused = scale_shift_residual(residual, self.history, self.coefficients)
        total = residual + self.reused() if fused is None else fused
        return total if hasattr(self.inner, "conv_shortcut") else (total,)

    def reused(self) -> torch.Tensor:
        """``scale * C_last (+ before * C_before) + shift`` (section 3.4)."""
        last = self.history[0]
        if self.coefficients is None:
            return last
        rows = self.coefficients.to(last)[:, :, None, None]
        total = rows[0] * last + rows[-1]
        if len(rows) == 3:
            # Before the second recompute there is no earlier output: the last one stands in.
            total = total + rows[1] * self.history[-1]
        return total


def _tensor(result: Any) -> torch.Tensor:
    """What a block returns, out of its wrapping."""
    if isinstance(result, torch.Tensor):
        return result
    tensor: torch.Tensor = result[0] if isinstance(result, tuple) else result.sample
    return tensor


class CachedUNet:
    """A U-Net with its blocks made cacheable; a context manager that restores it on exit.

    Example:
        >>> with CachedUNet(model) as cached:                                # doctest: +SKIP
        ...     latents = denoise(cached, tables, schedule, None, noise, conditions, 5.0)
    """

    def __init__(self, model: SourceModel, outputs: int = 1) -> None:
        self.model = model
        self.call = UNetCall(model.unet, [condition.name for condition in model.conditions])
        self.blocks: list[CacheableBlock] = []
        self.on_reuse: OnReuse | None = None
        self._outputs = outputs

    def __enter__(self) -> CachedUNet:
        for block in self.model.blocks:
            cacheable = CacheableBlock(self.model.unet.get_submodule(block.path), self._outputs)
            self._install(block.path, cacheable)
            self.blocks.append(cacheable)
        return self

    def __exit__(self, *_: object) -> None:
        for block, cacheable in zip(self.model.blocks, self.blocks, strict=True):
            self._install(block.path, cacheable.inner)
        self.blocks = []

    def _install(self, path: str, module: torch.nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self.model.unet.get_submodule(parent), name, module)

    def reset(self) -> None:
        """Forget every computed output: a new image begins."""
        for block in self.blocks:
            block.history = []

    def __call__(
        self,
        sample: torch.Tensor,
        timestep: float,
        conditions: Sequence[torch.Tensor],
        recompute: np.ndarray | None = None,
        coefficients: Sequence[np.ndarray | torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """One step: sample [B, C, H, W] to model output [B, C, H, W].

        Args:
            sample: the scaled model input, with guidance both halves.
            timestep: the scheduler's number for the step.
            conditions: in the order of ``model.conditions``.
            recompute: bool [K]; default all.
            coefficients: per block [2 or 3, C_k], used where the block is reused.
        """
        for k, block in enumerate(self.blocks):
            block.recompute = recompute is None or bool(recompute[k])
            block.coefficients = None if coefficients is None else torch.as_tensor(coefficients[k])
            block.on_reuse = None if self.on_reuse is None else partial(self.on_reuse, k)
        timesteps = torch.full((sample.shape[0],), timestep, device=sample.device)
        output: torch.Tensor = self.call(sample, timesteps, *conditions)
        return output


def guided_output(output: torch.Tensor, scale: float, rescale: float) -> torch.Tensor:
    """Guidance between the halves of [2N, ...] and its rescale (arXiv 2305.08891, section 3.4)."""
    unconditional, conditional = output.chunk(2)
    guided: torch.Tensor = unconditional + scale * (conditional - unconditional)
    if rescale:
        axes = tuple(range(1, guided.ndim))
        spread = conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
        guided = guided * (rescale * spread + 1 - rescale)
    return guided


@dataclass(frozen=True)
class State:
    """What a step hands to the next; a difference of states is the error between them."""

    latents: torch.Tensor  # [N, C, H, W]
    history: torch.Tensor  # [N, C, H, W], the solver's

    def __add__(self, other: State) -> State:
        return State(self.latents + other.latents, self.history + other.history)

    def __sub__(self, other: State) -> State:
        return State(self.latents - other.latents, self.history - other.history)


class Denoiser:
    """The denoising loop in PyTorch, by the same tables as the runtime, a step at a time.

    Args:
        cached: the entered CachedUNet.
        tables: the solver's coefficients.
        conditions: by name, [2N, ...] with the unconditional half first, or [N, ...] where
            ``guidance_scale`` is 1.
        guidance_scale: 1 turns guidance off.
        guidance_rescale: 0 (off) to 1, as ``Session.denoise`` has it.
    """

    def __init__(
        self,
        cached: CachedUNet,
        tables: SolverTables,
        conditions: Mapping[str, torch.Tensor],
        guidance_scale: float,
        guidance_rescale: float = 0.0,
    ) -> None:
        self.cached = cached
        self.tables = tables
        self._conditions = [conditions[c.name] for c in cached.model.conditions]
        self._guidance_scale, self._guidance_rescale = guidance_scale, guidance_rescale

    def start(self, noise: torch.Tensor) -> State:
        """The state that step 0 sees; forgets every computed output."""
        self.cached.reset()
        latents = noise * self.tables.initial_scale
        return State(latents, torch.zeros_like(latents))

    def output(
        self,
        state: State,
        step: int,
        recompute: np.ndarray | None = None,
        coefficients: Sequence[np.ndarray | torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The guided model output [N, C, H, W] at a step; arguments as of ``CachedUNet``."""
        sample = state.latents * float(self.tables.input_scale[step])
        guided = self._guidance_scale != 1.0
        output = self.cached(
            torch.cat([sample, sample]) if guided else sample,
            float(self.tables.timesteps[step]),
            self._conditions,
            recompute,
            coefficients,
        )
        if not guided:
            return output
        return guided_output(output, self._guidance_scale, self._guidance_rescale)

    def advance(self, state: State, output: torch.Tensor, step: int) -> State:
        """The solver's step: linear in latents, output and history."""
        row = (self.tables.first if step == 0 else self.tables.coefficients)[step]
        a, b, c, _, d, e = (float(value) for value in row[:6])
        latents, history = state.latents, state.history
        return State(a * latents + b * output + c * history, d * latents + e * output)

    def step(
        self,
        state: State,
        step: int,
        recompute: np.ndarray | None = None,
        coefficients: Sequence[np.ndarray | torch.Tensor] | None = None,
    ) -> State:
        """One denoising step."""
        return self.advance(state, self.output(state, step, recompute, coefficients), step)

    def trajectory(self, noise: torch.Tensor) -> list[State]:
        """The uncached run: the states before each of the S steps, and the final one."""
        states = [self.start(noise)]
        for step in range(len(self.tables.timesteps)):
            states.append(self.step(states[-1], step))
        return states


@torch.no_grad()
def denoise(
    cached: CachedUNet,
    tables: SolverTables,
    schedule: Schedule,
    alignment: Alignment | None,
    noise: torch.Tensor,
    conditions: Mapping[str, torch.Tensor],
    guidance_scale: float,
    after_step: Callable[[int], None] | None = None,
    guidance_rescale: float = 0.0,
) -> torch.Tensor:
    """The whole loop: final latents [N, C, H, W].

    Args:
        cached: as of ``Denoiser``.
        tables: as of ``Denoiser``.
        schedule: which block is recomputed when.
        alignment: coefficients of reused outputs; None: reuse as it is.
        noise: [N, C, H, W], standard normal.
        conditions: as of ``Denoiser``.
        guidance_scale: as of ``Denoiser``.
        after_step: called with the step number; the blocks' ``history`` may be read there.
        guidance_rescale: as of ``Denoiser``.
    """
    run = Denoiser(cached, tables, conditions, guidance_scale, guidance_rescale)
    state = run.start(noise)
    for step in range(schedule.steps):
        rows = None if alignment is None else [table[step] for table in alignment.tables]
        state = run.step(state, step, schedule.recompute[step], rows)
        if after_step is not None:
            after_step(step)
    return state.latents
