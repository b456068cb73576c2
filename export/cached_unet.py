"""The reference: a diffusers U-Net whose blocks can be reused, and a denoising loop over it.

It serves profiling, alignment and quality evaluation, and is the oracle of every engine test: same
schedule, same alignment, same noise, same latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from blockcache.export.model import SourceModel, UNetCall
from blockcache.export.torch_kernels import scale_shift_residual
from blockcache.runtime.plan import Alignment, Schedule
from blockcache.runtime.solver import SolverTables


class CacheableBlock(torch.nn.Module):
    """Stands in for a spatial transformer: ``y = x + C``, where C may be an earlier output.

    ``history`` holds the computed outputs C, the last one first; at most ``outputs`` of them.
    """

    def __init__(self, inner: torch.nn.Module, outputs: int) -> None:
        super().__init__()
        self.inner = inner
        self.outputs = outputs
        self.recompute = True
        self.coefficients: torch.Tensor | None = None  # [2 or 3, C_k], used where reused
        self.history: list[torch.Tensor] = []

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The transformer itself at a recompute step, the aligned sum at a reuse step."""
        if self.recompute:
            result = self.inner(hidden_states, *args, **kwargs)
            output = result[0] if isinstance(result, tuple) else result.sample
            self.history = [output - hidden_states, *self.history][: self.outputs]
            return result
        fused = scale_shift_residual(hidden_states, self.history, self.coefficients)
        return (hidden_states + self.reused() if fused is None else fused,)

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
        coefficients: Sequence[np.ndarray] | None = None,
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
            block.coefficients = None if coefficients is None else torch.from_numpy(coefficients[k])
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
    """The whole loop in PyTorch, by the same tables as the runtime.

    Args:
        cached: the entered CachedUNet.
        tables: the solver's coefficients.
        schedule: which block is recomputed when.
        alignment: coefficients of reused outputs; None: reuse as it is.
        noise: [N, C, H, W], standard normal.
        conditions: by name, [2N, ...] with the unconditional half first, or [N, ...] where
            ``guidance_scale`` is 1.
        guidance_scale: 1 turns guidance off.
        after_step: called with the step number; the blocks' ``history`` may be read there.
        guidance_rescale: 0 (off) to 1, as ``Session.denoise`` has it.

    Returns:
        The denoised latents [N, C, H, W].
    """
    cached.reset()
    inputs = [conditions[condition.name] for condition in cached.model.conditions]
    guided = guidance_scale != 1.0
    sample = noise * tables.initial_scale
    history = torch.zeros_like(sample)
    for step in range(schedule.steps):
        scaled = sample * float(tables.input_scale[step])
        output = cached(
            torch.cat([scaled, scaled]) if guided else scaled,
            float(tables.timesteps[step]),
            inputs,
            schedule.recompute[step],
            None if alignment is None else [table[step] for table in alignment.tables],
        )
        if guided:
            output = guided_output(output, guidance_scale, guidance_rescale)
        row = tables.first[step] if step == 0 else tables.coefficients[step]
        a, b, c, _, d, e = (float(value) for value in row[:6])
        sample, history = a * sample + b * output + c * history, d * sample + e * output
        if after_step is not None:
            after_step(step)
    return sample
