"""Contestants in PyTorch: eager, compiled, and other projects' caches on the same U-Net.

All run one plain loop by the runtime's own solver tables, so that only the U-Net's evaluation
differs. Two peers take a U-Net: DeepCache's helper, and of diffusers' own hooks Pyramid Attention
Broadcast. Its others do not (diffusers 0.42): first-block cache, MagCache and SeaCache look for
registered transformer blocks, of which ``UNet2DConditionModel`` has none; FasterCache and
TaylorSeer attach to the same attention modules as Pyramid Attention Broadcast and are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import TypeAlias

import torch

from blockcache.export import SourceModel
from blockcache.export.unet.model import TORCH_DTYPES
from blockcache.runtime import EngineError, MissingExtraError, Preset, SolverConfig
from blockcache.runtime.solvers.solver import SolverTables, solver_tables
from blockcache.tools.bench.contestants import Contestant, Entry, Kind
from blockcache.tools.bench.sessions import GUIDANCE, base_name

Around: TypeAlias = Callable[[SolverTables], AbstractContextManager[None]]
Evaluate: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(sample [B, C, H, W], timestep []) to the model's output [B, C, H, W]."""

DEEPCACHE_INTERVAL = 3
"""Recompute everything at every third step: the first setting of DeepCache's own tables."""


class TorchLoop:
    """One U-Net on one device, and the random request that every contestant denoises."""

    def __init__(self, model: SourceModel, precision: str, images: int) -> None:
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if cuda else "cpu")
        # Half precision is slower than float32 on most CPUs, and the engines there run float32.
        self.dtype = TORCH_DTYPES[precision if cuda else "float32"]
        # The plain Module.to: diffusers' own warns of modules to keep in float32 where none are.
        self._call = torch.nn.Module.to(model.call(), self.device, self.dtype).eval()
        self.unet = self._call.unet
        self.images = images
        generator = torch.Generator().manual_seed(0)
        sizes = model.sizes(batch=2 * images)
        self.conditions = []
        for condition in model.conditions:
            shape = condition.sized(sizes)
            whole = condition.dtype == "int64"
            made = torch.zeros(shape) if whole else torch.randn(shape, generator=generator)
            dtypes = {"model": self.dtype, "int64": torch.int64, **TORCH_DTYPES}
            self.conditions.append(made.to(self.device, dtypes[condition.dtype]))
        latents = [images, model.channels, *model.sample_size]
        self.noise = torch.randn(latents, generator=generator).to(self.device)

    def evaluate(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The U-Net as it is: sample [2N, C, H, W], timestep [] to its output."""
        return self._call(sample, timestep, *self.conditions)

    @torch.inference_mode()
    def denoise(self, evaluate: Evaluate, tables: SolverTables) -> torch.Tensor:
        """Guided denoising by the solver's tables: float32 [N, C, H, W]."""
        sample = self.noise * float(tables.initial_scale)
        rows, past = tables.rows_from(0).tolist(), tuple[torch.Tensor, ...]()
        for step, timestep in enumerate(tables.timesteps):
            scaled = (sample * float(tables.input_scale[step])).to(self.dtype)
            at = torch.tensor(float(timestep), device=self.device)
            output = evaluate(torch.cat([scaled, scaled]), at).float()
            unconditional, conditional = output.chunk(2)
            output = unconditional + GUIDANCE * (conditional - unconditional)
            row = rows[step]
            following = row[0] * sample + row[1] * output
            for coefficient, x0 in zip(row[2:4], past, strict=False):
                following = following + coefficient * x0
            if row[7]:
                following = following + row[7] * torch.randn_like(following)
            sample, past = following, (row[4] * sample + row[5] * output, *past[:1])
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return sample

    def contestant(
        self,
        engine: str,
        kind: Kind,
        preset: Preset,
        evaluate: Evaluate | None = None,
        around: Callable[[SolverTables], AbstractContextManager[None]] = lambda tables: (
            nullcontext()
        ),
    ) -> Contestant:
        """Denoising by ``evaluate``, by default the U-Net as it is, inside of ``around``."""
        tables = solver_tables(SolverConfig.from_json(preset.solver))
        call = evaluate or self.evaluate

        def run() -> None:
            try:
                with around(tables):
                    self.denoise(call, tables)
            except RuntimeError as error:  # out of memory, a compiler that gave up
                raise EngineError(f"{engine} failed: {error}") from error

        return Contestant(
            engine=engine,
            kind=kind,
            preset=preset.name,
            base=base_name(preset),
            steps=preset.schedule.steps,
            images=self.images,
            run=run,
            memory={"weights": sum(p.numel() * p.element_size() for p in self.unet.parameters())},
        )


def _eager(loop: TorchLoop, base: Preset) -> Contestant:
    return loop.contestant("torch", "whole", base)


def _compiled(loop: TorchLoop, base: Preset) -> Contestant:
    # CUDA graphs of Inductor's own on a GPU: small launches cost nothing there either.
    mode = "reduce-overhead" if loop.device.type == "cuda" else "default"
    evaluate = torch.compile(loop.evaluate, mode=mode)
    return loop.contestant("torch-compile", "whole", base, evaluate)


def _deepcache(loop: TorchLoop, base: Preset) -> Contestant:
    """DeepCache's helper, branch 0."""
    try:
        from DeepCache import DeepCacheSDHelper
    except ImportError as error:
        raise MissingExtraError(
            "DeepCache is not installed. Install it with: pip install DeepCache"
        ) from error

    @contextmanager
    def caching(tables: SolverTables) -> Iterator[None]:
        # It finds the step by looking for the timestep among the scheduler's.
        scheduler = SimpleNamespace(timesteps=tables.timesteps.tolist())
        helper = DeepCacheSDHelper(SimpleNamespace(unet=loop.unet, scheduler=scheduler))
        helper.set_params(cache_interval=DEEPCACHE_INTERVAL, cache_branch_id=0)
        helper.enable()
        try:
            yield
        finally:
            helper.disable()

    return loop.contestant("deepcache", "peer", base, around=caching)


def _pyramid(loop: TorchLoop, base: Preset) -> Contestant:
    """Self-attention at every second step, cross-attention at every fourth."""
    from diffusers import PyramidAttentionBroadcastConfig
    from diffusers.hooks import apply_pyramid_attention_broadcast

    everywhere = (-1, 1 << 30)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=4,
        spatial_attention_timestep_skip_range=everywhere,
        cross_attention_timestep_skip_range=everywhere,
        current_timestep_callback=lambda: 0,
    )

    @contextmanager
    def caching(tables: SolverTables) -> Iterator[None]:
        apply_pyramid_attention_broadcast(loop.unet, config)
        try:
            yield
        finally:
            for module in loop.unet.modules():
                if hasattr(module, "_diffusers_hook"):
                    module._diffusers_hook.remove_hook("pyramid_attention_broadcast")

    return loop.contestant("diffusers-pab", "peer", base, around=caching)


TORCH_ENGINES: dict[str, Callable[[TorchLoop, Preset], Contestant]] = {
    "torch": _eager,
    "torch-compile": _compiled,
    "deepcache": _deepcache,
    "diffusers-pab": _pyramid,
}
"""By the name that ``blockcache bench --engine`` takes."""


def torch_contestants(loop: TorchLoop, engine: str, bases: Sequence[Preset]) -> Iterator[Entry]:
    """One contestant for the solver and steps of each base."""
    for base in bases:
        yield Entry(f"{engine} {base.name}", partial(TORCH_ENGINES[engine], loop, base))


def open_loop(model: str, precision: str, images: int, threads: int | None) -> TorchLoop:
    """The loop on the GPU where there is one.

    Args:
        model: as ``blockcache compile`` takes it, or a name of ``scale``, with random weights.
        precision: of the bundle; the CPU runs float32.
        images: in one call.
        threads: of PyTorch on the CPU.
    """
    from blockcache.tools.bench.random_unet import CONFIGS, random_source
    from blockcache.tools.sources.models import load_source

    if threads:
        torch.set_num_threads(threads)
    dtype = precision if torch.cuda.is_available() else "float32"
    source = random_source(model, dtype) if model in CONFIGS else load_source(model, dtype=dtype)
    return TorchLoop(source, precision, images)
