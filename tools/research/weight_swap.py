"""What does a swap of weights do to a schedule and an alignment that were measured before it?

    python -m blockcache.tools.research.weight_swap OUT

A LoRA of the demo model is trained to draw all styles as one of them, on a few pictures that the
model drew itself, and merged as ``compile --lora`` does. Then three bundles draw the same images:
the base; the tuned weights under the base's presets, as after ``Session.swap_weights``; the tuned
weights under presets that were measured with them. A distance is the relative L2 of the final
latents to the converged run of the weights that draw, mean and standard error over images of
captions that neither trained nor calibrated. A drift monitor watches a session of the base before
and after the swap.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from blockcache.export import (
    AlignmentOptions,
    Calibration,
    CompileOptions,
    Lora,
    MeasurementOptions,
    PresetOptions,
    ProfileOptions,
    SourceModel,
    TrialOptions,
    compile_model,
)
from blockcache.export.measure.sampling import Sampling
from blockcache.runtime import Bundle, DriftMonitor, DriftReport, Preset, Session, SolverConfig
from blockcache.runtime.plan import LOOP_ROLES
from blockcache.runtime.run_table import flops_run
from blockcache.runtime.solvers.diffusers_config import solver_from_diffusers
from blockcache.tools.demo.concepts import caption
from blockcache.tools.demo.prompts import CONCEPTS, STYLES
from blockcache.tools.evaluation.quality import relative_distance
from blockcache.tools.report.errors import one_line_errors
from blockcache.tools.report.progress import StageProgress
from blockcache.tools.report.tables import markdown_table
from blockcache.tools.research.converged import SEED, Draws, judging_prompts
from blockcache.tools.sources.codecs import DemoCodec
from blockcache.tools.sources.converged import converged_preset
from blockcache.tools.sources.models import DEMO, load_source
from blockcache.tools.sources.prompts import calibration_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PRESETS = ("dpm:20", "dpm-auto:10", "dpm:20:0.5", "dpm:20:x2")
WATCHED = "dpm-20-d0.5"
"""The one that has a profile."""

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
"""The layers of attention that a LoRA changes, as they usually are."""

BATCH, LEARNING_RATE, EMPTIED = 8, 1e-3, 0.1
WINDOW = 8  # images of the drift monitor's mean


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the LoRA, the bundles and the latents.")],
    images: Annotated[int, typer.Option(min=WINDOW, help="To draw and to compare.")] = 12,
    steps: Annotated[int, typer.Option(min=1, help="Of training.")] = 150,
    rank: Annotated[int, typer.Option(min=1, help="Of the LoRA.")] = 8,
) -> None:
    """Train, compile three bundles, draw, and print both tables."""
    base, calibration = load_source(DEMO), calibration_for(DEMO, None, None)
    file = out / f"style-{rank}-{steps}.safetensors"
    if not file.is_file():
        train(load_source(DEMO), file, steps, rank)
    tuned = load_source(DEMO, loras=(Lora(file),))
    print(f"relative change of the weights that the LoRA touches: {moved(base, tuned):.3f}")
    with StageProgress() as progress:
        own = CompileOptions(
            presets=tuple(map(PresetOptions.parse, PRESETS)),
            measurement=MeasurementOptions(
                profile=ProfileOptions(prompts=16, seeds=1),
                alignment=AlignmentOptions(images=24),
                trials=TrialOptions(candidates=4, images=6),
            ),
        )
        before = compile_model(base, out / "base", own, calibration, progress).bundle
        like = CompileOptions(presets=(), like=before)
        swapped = compile_model(tuned, out / "swapped", like, None, progress).bundle
        anew = compile_model(tuned, out / "tuned", own, calibration, progress).bundle
        draws = {
            name: Drawings(bundle, model, images, out / "latents", progress)
            for name, bundle, model in (
                ("base", before, base), ("swapped", swapped, tuned), ("anew", anew, tuned),
            )
        }  # fmt: skip
        print(table(draws))
        apart = relative_distance(draws["swapped"].converged, draws["base"].converged)
        print(f"converged runs of both weights, from each other: {apart.mean():.3f}")
    for title, report in watched(before, swapped, images):
        print(f"{title}: {report}")


# -- the LoRA --------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """A weight [O, I] plus ``b @ a``, of a rank; nothing at first."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The sum."""
        return weight + self.b @ self.a


def train(model: SourceModel, file: Path, steps: int, rank: int) -> None:
    """All styles' captions are to give what the first style's give; written as diffusers has it."""
    from diffusers import DDPMScheduler
    from safetensors.torch import save_file

    torch.manual_seed(0)
    latents = torch.from_numpy(drawn(model, [caption(STYLES[0], words) for words in CONCEPTS]))
    captions = [caption(style, words) for words in CONCEPTS for style in STYLES[1:]]
    positive, negative = DemoCodec().encode(captions)
    contexts, empty = (
        torch.from_numpy(side["encoder_hidden_states"]) for side in (positive, negative)
    )
    schedule = DDPMScheduler.from_config(dict(model.scheduler))
    model.unet.requires_grad_(False)
    touched = {name: layer for name, layer in model.unet.named_modules() if is_touched(name)}
    for layer in touched.values():
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))
    low = {name: layer.parametrizations.weight[0] for name, layer in touched.items()}
    optimizer = torch.optim.AdamW(
        [each for pair in low.values() for each in pair.parameters()], LEARNING_RATE
    )
    with StageProgress() as progress:
        for step in range(steps):
            progress("train", step, steps)
            rows = torch.randint(len(captions), (BATCH,))
            emptied = torch.rand(BATCH) < EMPTIED
            context = torch.where(emptied[:, None, None], empty, contexts[rows])
            clean = latents[rows // len(STYLES[1:])]
            noise, at = torch.randn_like(clean), torch.randint(1000, (BATCH,))
            output = model.unet(schedule.add_noise(clean, noise, at), at, context).sample
            loss = F.mse_loss(output, schedule.get_velocity(clean, noise, at))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    tensors = {}
    for name, pair in low.items():
        tensors[f"unet.{name}.lora_A.weight"] = pair.a.detach().contiguous()
        tensors[f"unet.{name}.lora_B.weight"] = pair.b.detach().contiguous()
    for layer in touched.values():
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)


def is_touched(name: str) -> bool:
    """Whether a LoRA changes the module of that path."""
    return name.endswith(tuple(f".{projection}" for projection in PROJECTIONS))


def drawn(model: SourceModel, captions: list[str]) -> np.ndarray:
    """Latents of the captions, float32 [N, C, h, w]: what the LoRA learns from."""
    solver = solver_from_diffusers(model.scheduler, solver="dpm", steps=12)
    sampling = Sampling(model, solver, Calibration(*DemoCodec().encode(captions)))
    with sampling.cached_unet() as cached:
        denoiser, noise = sampling.begin(cached, [(i, i) for i in range(len(captions))])
        return denoiser.denoise(noise, sampling.uncached).numpy()


def moved(base: SourceModel, tuned: SourceModel) -> float:
    """|tuned - base| / |base| over the weights that a LoRA touches."""
    before, after = base.unet.state_dict(), tuned.unet.state_dict()
    names = [n for n in before if n.endswith(".weight") and is_touched(n.removesuffix(".weight"))]
    sizes = [
        torch.stack([weight.double().square().sum() for weight in weights]).sum().sqrt()
        for weights in ([after[n] - before[n] for n in names], [before[n] for n in names])
    ]
    return float(sizes[0] / sizes[1])


# -- what they draw --------------------------------------------------------------------------------


class Drawings:
    """What a bundle's presets draw, and the converged run of its weights."""

    def __init__(
        self,
        bundle: Bundle,
        model: SourceModel,
        images: int,
        work: Path,
        observer: Callable[[str, int, int], None],
    ) -> None:
        self.bundle, presets = bundle, bundle.presets
        draw = Draws(bundle, judging_prompts(), images, work)
        first = presets["dpm-20"]
        solver = SolverConfig.from_json(first.solver)
        sampling = Sampling(model, solver, draw.prompts, first.guidance_scale)
        found = {}
        for done, preset in enumerate((converged_preset(bundle, first), *presets.values())):
            observer(f"draw {bundle.folder.name}", done, 1 + len(presets))
            found[preset.name] = draw.preset(preset, sampling)
        self.converged = found.pop("converged")
        self.presets = {
            name: relative_distance(latents, self.converged) for name, latents in found.items()
        }

    def cost(self, preset: Preset) -> float:
        """FLOPs of the loop, in uncached steps."""
        segments = self.bundle.segments
        once = sum(segment.flops for segment in segments if segment.role in LOOP_ROLES)
        return float(flops_run(segments, preset.schedule).sum()) / once


def table(draws: dict[str, Drawings]) -> str:
    """One row a preset: what it costs, and how far each bundle ends from its converged run."""
    rows = []
    for name, preset in draws["base"].bundle.presets.items():
        costs = [draws[of].cost(draws[of].bundle.presets[name]) for of in ("base", "anew")]
        far = [_mean(draws[of].presets[name]) for of in ("base", "swapped", "anew")]
        rows.append([f"`{preset.name}`", f"{costs[0]:.1f}, {costs[1]:.1f}", *far])
    header = ["preset", "FLOPs in steps, base and anew", "base", "swapped", "measured anew"]
    return markdown_table(header, rows)


def watched(before: Bundle, swapped: Bundle, images: int) -> Iterator[tuple[str, DriftReport]]:
    """What a monitor says of the base's traffic, and of the same after a swap."""
    positive, negative = (
        side["encoder_hidden_states"] for side in vars(judging_prompts()).values()
    )
    for title in ("before the swap", "after the swap"):
        monitor = DriftMonitor(window=WINDOW, on_drift=lambda _: None)
        with Session.open(before, preset=WATCHED, drift=monitor, verify=False) as session:
            if title == "after the swap":
                session.swap_weights(swapped, verify=False)
            for begin in range(0, images, WINDOW):
                some = range(begin, min(begin + WINDOW, images))
                noise = session.noise([SEED + image for image in some])
                session.denoise(noise, positive[some.start : some.stop], negative)
        yield title, monitor.report()


def _mean(values: np.ndarray) -> str:
    return f"{values.mean():.4f} ± {values.std(ddof=1) / np.sqrt(len(values)):.4f}"


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
