"""The reference: a diffusers U-Net whose blocks can be reused, and a denoising loop over it.

It serves profiling, alignment and quality evaluation, and is the oracle of every engine test: same
schedule, same alignment, same noise, same latents.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch

from blockcache.export.unet.model import BRANCH, SourceModel, module_path
from blockcache.export.unet.steps import Past, Steps
from blockcache.export.unet.torch_kernels import scale_shift_residual
from blockcache.runtime.plan import WHOLE, Alignment, Schedule

Kept: TypeAlias = tuple[tuple[torch.Tensor, ...], ...]
"""Per block, the outputs C [B, C_k, H, W] that it computed last and a reuse may combine, the
latest first; ``()`` before a block has computed any."""

Coefficients: TypeAlias = Sequence[np.ndarray | torch.Tensor]
"""Per block, what its kept outputs are reused with at one step: [2 or 3, C_k]."""

Fit: TypeAlias = Callable[[int, torch.Tensor, Sequence[torch.Tensor]], torch.Tensor]
"""Gives the coefficients of block k when it is reused, from what the block would compute there,
C [B, C_k, H, W], and from its kept outputs; called as ``fit(k, computed, kept)``."""


class Cacheable(torch.nn.Module):
    """Stands in for a module of the U-Net whose output, or input, may be an earlier one.

    ``CachedUNet`` says before every call what to do, in the attributes below.
    """

    def __init__(self, inner: torch.nn.Module, outputs: int) -> None:
        super().__init__()
        self.inner = inner
        self.outputs = outputs  # computed outputs to keep, at most
        self.recompute = True
        self.kept: tuple[torch.Tensor, ...] = ()  # before the call; after it, with what it computed
        self.coefficients: torch.Tensor | None = None  # [2 or 3, C_k], used where reused
        self.fit: Callable[[torch.Tensor, Sequence[torch.Tensor]], torch.Tensor] | None = None

    def keep(self, computed: torch.Tensor) -> None:
        """Put an output in front of those that are kept."""
        self.kept = (computed, *self.kept)[: self.outputs]

    def reused(self) -> torch.Tensor:
        """``scale * C_last (+ before * C_before) + shift`` (section 3.4)."""
        last = self.kept[0]
        if self.coefficients is None:
            return last
        rows = self.coefficients.to(last)[:, :, None, None]
        total = rows[0] * last + rows[-1]
        if len(rows) == 3:
            # Before the second recompute there is no earlier output: the last one stands in.
            total = total + rows[1] * self.kept[-1]
        return total


class CacheableBlock(Cacheable):
    """Stands in for a spatial transformer: ``y = x + C``, where C may be an earlier output.

    Or for a ResBlock, whose x goes through a 1 x 1 convolution where the width changes.
    """

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The transformer itself at a recompute step, the aligned sum at a reuse step."""
        shortcut = getattr(self.inner, "conv_shortcut", None)
        residual = hidden_states if shortcut is None else shortcut(hidden_states)
        if self.recompute or self.fit is not None:
            result = self.inner(hidden_states, *args, **kwargs)
            computed = _tensor(result) - residual
            if self.recompute:
                self.keep(computed)
                return result
            assert self.fit is not None
            self.coefficients = self.fit(computed, self.kept)
        fused = scale_shift_residual(residual, self.kept, self.coefficients)
        total = residual + self.reused() if fused is None else fused
        return total if hasattr(self.inner, "conv_shortcut") else (total,)


class CacheableBranch(Cacheable):
    """Stands in for the ResBlock that joins a branch's output to a skip.

    The branch has run by then, whether its output is used or not: this is the reference, which has
    to be right, not fast.
    """

    def __init__(self, inner: torch.nn.Module, outputs: int, channels: int) -> None:
        super().__init__(inner, outputs)
        self.channels = channels  # of the branch's output; the rest of the input is the skip

    def forward(self, joined: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The ResBlock on ``joined`` [B, C + skip, H, W], its first C channels reused or not."""
        computed = joined[:, : self.channels]
        if self.recompute:
            self.keep(computed)
        else:
            if self.fit is not None:
                self.coefficients = self.fit(computed, self.kept)
            joined = torch.cat([self.reused(), joined[:, self.channels :]], dim=1)
        return self.inner(joined, *args, **kwargs)


class CacheableOutput(Cacheable):
    """Stands in for the U-Net's last convolution: the model output may be an earlier one."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The model output [B, C, H, W]."""
        computed: torch.Tensor = self.inner(hidden_states)
        if self.recompute:
            self.keep(computed)
            return computed
        if self.fit is not None:
            self.coefficients = self.fit(computed, self.kept)
        return self.reused()


def _tensor(result: Any) -> torch.Tensor:
    """What a block returns, out of its wrapping."""
    if isinstance(result, torch.Tensor):
        return result
    tensor: torch.Tensor = result[0] if isinstance(result, tuple) else result.sample
    return tensor


class CachedUNet:
    """A U-Net with its blocks and branches cacheable; a context manager that restores it on exit.

    Args:
        model: the U-Net.
        outputs: how many computed outputs of a block are kept: 1, or 2 for history.

    Example:
        >>> with CachedUNet(model) as cached:                                # doctest: +SKIP
        ...     denoiser = Denoiser(cached, TableSteps(tables), conditions, 5.0)
        ...     latents = denoiser.denoise(noise, schedule)
    """

    def __init__(self, model: SourceModel, outputs: int = 1) -> None:
        self.model = model
        self.call = model.call()
        self.blocks: list[Cacheable] = []
        self.rows = 0  # of all samples that it has evaluated; guidance takes two an image
        self._outputs = outputs

    def __enter__(self) -> CachedUNet:
        for block in self.model.blocks:
            inner, outputs = self.call.get_submodule(module_path(block.path)), self._outputs
            cacheable: Cacheable
            if block.kind != BRANCH:
                cacheable = CacheableBlock(inner, outputs)
            elif block.depth == WHOLE:
                cacheable = CacheableOutput(inner, outputs)
            else:
                cacheable = CacheableBranch(inner, outputs, block.channels)
            self._install(block.path, cacheable)
            self.blocks.append(cacheable)
        return self

    def __exit__(self, *_: object) -> None:
        # The last one first: with ResBlocks as blocks, a branch may stand around one of them.
        for block, cacheable in reversed([*zip(self.model.blocks, self.blocks, strict=True)]):
            self._install(block.path, cacheable.inner)
        self.blocks = []

    def _install(self, path: str, module: torch.nn.Module) -> None:
        parent, _, name = module_path(path).rpartition(".")
        setattr(self.call.get_submodule(parent), name, module)

    def __call__(
        self,
        sample: torch.Tensor,
        timestep: float,
        conditions: Sequence[torch.Tensor],
        kept: Kept = (),
        recompute: np.ndarray | None = None,
        coefficients: Coefficients | Fit | None = None,
    ) -> tuple[torch.Tensor, Kept]:
        """One evaluation: the model output [B, C, H, W], and the outputs that are kept then.

        Args:
            sample: the scaled model input [B, C, H, W], with guidance both halves.
            timestep: the scheduler's number for the step.
            conditions: in the order of ``model.conditions``.
            kept: what the evaluation before has kept; nothing where there was none.
            recompute: bool [K]; default all.
            coefficients: what reused outputs are aligned with; None: they are reused as they are.
        """
        self.rows += len(sample)
        for k, block in enumerate(self.blocks):
            block.recompute = recompute is None or bool(recompute[k])
            block.kept = kept[k] if kept else ()
            block.fit, block.coefficients = None, None
            if callable(coefficients):
                block.fit = partial(coefficients, k)
            elif coefficients is not None:
                block.coefficients = torch.as_tensor(coefficients[k])
        timesteps = torch.full((sample.shape[0],), timestep, device=sample.device)
        output: torch.Tensor = self.call(sample, timesteps, *conditions)
        return output, self._kept(kept)

    def _kept(self, before: Kept) -> Kept:
        """What is kept after a call: nothing new of what lies in a branch that is reused."""
        reused = [
            described.depth
            for described, block in zip(self.model.blocks, self.blocks, strict=True)
            if described.kind == BRANCH and not block.recompute
        ]
        deepest = min(reused, default=math.inf)
        return tuple(
            before[k] if described.depth > deepest else block.kept
            for k, (described, block) in enumerate(zip(self.model.blocks, self.blocks, strict=True))
        )


def guided_output(
    output: torch.Tensor, scale: float, rescale: float, image_scale: float = 1.0
) -> torch.Tensor:
    """Guidance between the halves of [2N, ...] and its rescale (arXiv 2305.08891, section 3.4).

    With an ``image_scale`` other than 1, between thirds, as InstructPix2Pix has it.
    """
    if image_scale != 1:
        nothing, image, both = output.chunk(3)
        weighed: torch.Tensor = nothing + image_scale * (image - nothing) + scale * (both - image)
        return weighed
    unconditional, conditional = output.chunk(2)
    guided: torch.Tensor = unconditional + scale * (conditional - unconditional)
    if rescale:
        axes = tuple(range(1, guided.ndim))
        spread = conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
        guided = guided * (rescale * spread + 1 - rescale)
    return guided


@dataclass(frozen=True)
class State:
    """What a step hands to the next."""

    latents: torch.Tensor  # [N, C, H, W]
    past: Past = ()  # what the solver remembers
    kept: Kept = ()

    def __add__(self, error: State) -> State:
        """The state with an error in it; nothing is kept."""
        past = tuple(own + more for own, more in zip(self.past, error.past, strict=True))
        return State(self.latents + error.latents, past)

    def __sub__(self, other: State) -> State:
        """The error between two states; nothing is kept."""
        past = tuple(own - less for own, less in zip(self.past, other.past, strict=True))
        return State(self.latents - other.latents, past)


class Denoiser:
    """The denoising loop in PyTorch, a step at a time.

    It holds no state: every step takes one and returns the next.

    Args:
        cached: the entered CachedUNet.
        solver: the solver's part.
        conditions: by name, [2N, ...] with the unconditional half first, [3N, ...] with an
            ``image_guidance_scale``, or [N, ...] where ``guidance_scale`` is 1 or less.
        guidance_scale: 1 or less turns guidance off, as in diffusers.
        guidance_rescale: 0 (off) to 1, as ``Session.denoise`` has it.
        image_guidance_scale: the same, of InstructPix2Pix; 1: off.
    """

    def __init__(
        self,
        cached: CachedUNet,
        solver: Steps,
        conditions: Mapping[str, torch.Tensor],
        guidance_scale: float,
        guidance_rescale: float = 0.0,
        image_guidance_scale: float = 1.0,
    ) -> None:
        self.cached = cached
        self.solver = solver
        self._conditions = [conditions[c.name] for c in cached.model.conditions]
        self._scales = (guidance_scale, guidance_rescale, image_guidance_scale)
        thirds = image_guidance_scale != 1
        self._rows = 1 if guidance_scale <= 1 else 3 if thirds else 2

    def start(
        self, noise: torch.Tensor, image_latents: torch.Tensor | None = None, start_step: int = 0
    ) -> State:
        """The state that the first executed step sees.

        Args:
            noise: [N, C, H, W], standard normal.
            image_latents: [N, C, H, W] to start from (image-to-image), noised to the level of
                ``start_step``; None: pure noise.
            start_step: the first step that will be executed.
        """
        return State(self.solver.start(noise, image_latents, start_step))

    def output(
        self,
        state: State,
        step: int,
        recompute: np.ndarray | None = None,
        coefficients: Coefficients | Fit | None = None,
    ) -> tuple[torch.Tensor, Kept]:
        """The guided model output [N, C, H, W] at a step, and the outputs that are kept then.

        ``recompute`` and ``coefficients`` as of ``CachedUNet``.
        """
        sample = self.solver.model_input(state.latents, state.past, step)
        output, kept = self.cached(
            torch.cat([sample] * self._rows),
            float(self.solver.timesteps[step]),
            self._conditions,
            state.kept,
            recompute,
            coefficients,
        )
        if self._rows > 1:
            output = guided_output(output, *self._scales)
        return output, kept

    def advance(self, state: State, output: torch.Tensor, kept: Kept, step: int) -> State:
        """The solver's step."""
        return State(*self.solver.advance(state.latents, state.past, output, step), kept)

    def step(
        self,
        state: State,
        step: int,
        recompute: np.ndarray | None = None,
        coefficients: Coefficients | Fit | None = None,
    ) -> State:
        """One denoising step; arguments as of ``output``."""
        output, kept = self.output(state, step, recompute, coefficients)
        return self.advance(state, output, kept, step)

    @torch.no_grad()
    def trajectory(
        self,
        noise: torch.Tensor,
        schedule: Schedule,
        alignment: Alignment | None = None,
        *,
        image_latents: torch.Tensor | None = None,
        start_step: int = 0,
    ) -> Iterator[State]:
        """The states after each step from ``start_step`` on.

        Args:
            noise: [N, C, H, W], standard normal.
            schedule: which block is recomputed when; the first executed step recomputes all.
            alignment: coefficients of reused outputs; None: they are reused as they are.
            image_latents: as of ``start``.
            start_step: as of ``start``.
        """
        state = self.start(noise, image_latents, start_step)
        for step in range(start_step, schedule.steps):
            recompute = None if step == start_step else schedule.recompute[step]
            rows = None if alignment is None else [table[step] for table in alignment.tables]
            state = self.step(state, step, recompute, rows)
            yield state

    def denoise(
        self,
        noise: torch.Tensor,
        schedule: Schedule,
        alignment: Alignment | None = None,
        *,
        image_latents: torch.Tensor | None = None,
        start_step: int = 0,
    ) -> torch.Tensor:
        """The whole loop: final latents [N, C, H, W]; arguments as of ``trajectory``."""
        states = self.trajectory(
            noise, schedule, alignment, image_latents=image_latents, start_step=start_step
        )
        (last,) = deque(states, maxlen=1)
        return last.latents
