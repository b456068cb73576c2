"""A bundle in a diffusers pipeline, where its U-Net stood. The one file here that knows torch.

::

    from blockcache.diffusers import attach

    attach(pipe, "bundle")                            # the U-Net, and the preset's own scheduler
    pipe("a red bicycle", num_inference_steps=20)     # as ever

The pipeline keeps its loop, its guidance and its callbacks. It calls the U-Net step by step, and
each call is a ``predict`` of ``Session.begin``. Which step a call belongs to is asked of the
pipeline's scheduler, never found by the timestep's value, which may occur twice.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import ConfigMixin, ControlNetModel, MultiControlNetModel, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.errors import ConfigError, InputError, UnsupportedModelError
from blockcache.runtime.open_request import OpenRequest
from blockcache.runtime.plan import LAST_TIMESTEP, Preset, control_names, controlnet_count
from blockcache.runtime.request import CLASSES
from blockcache.runtime.session import Session
from blockcache.runtime.solvers.diffusers_config import solver_of
from blockcache.runtime.solvers.recorded import DiffusersScheduler, recorded_solver
from blockcache.runtime.solvers.solver import SolverConfig, SolverTables, solver_tables

_NO_PLACE = {
    "timestep_cond": "guidance embeddings (LCM)",
    "attention_mask": "attention masks",
    "encoder_attention_mask": "attention masks of the prompt",
    "cross_attention_kwargs": "cross_attention_kwargs",
    "down_block_additional_residuals": "ControlNet residuals",
    "mid_block_additional_residual": "ControlNet residuals",
    "down_intrablock_additional_residuals": "T2I-Adapter residuals",
}
"""Arguments of diffusers' U-Net that change the picture and that no bundle has."""


def attach(
    pipeline: Any,
    bundle: Bundle | str | Path,
    *,
    preset: str | None = None,
    keep_scheduler: bool = False,
    **options: Any,
) -> BundleUNet:
    """Put a bundle where a pipeline's U-Net stands, and its preset's scheduler with it.

    ControlNets that are in the bundle stand in for the pipeline's, which has to have the same.

    What is replaced is kept for ``detach``. It stays where it is: ``pipeline.unet.to("cpu")``
    before this call makes room on a GPU.

    Args:
        pipeline: of Stable Diffusion 1.x, 2.x or XL: text-to-image, image-to-image, inpainting,
            InstructPix2Pix, depth2img, the x4 upscaler, or with ControlNets.
        bundle: what ``blockcache compile`` made of the pipeline's own U-Net.
        preset: one of its presets; default the recommended one. ``num_inference_steps`` of later
            calls is the preset's step count, or that of the uncached run that it replaces.
        keep_scheduler: leave the pipeline's scheduler. It has to visit the preset's timesteps, and
            the schedule is then run with a solver that it may not have been measured with.
        options: as for ``Session.open``: backend, threads, stream, ...

    Raises:
        UnsupportedModelError: the pipeline's U-Net has something that the bundle has not, such as
            a LoRA, or is another U-Net; it has ControlNets and the bundle has none, or others.
        BundleError, EngineError: see ``Session.open``.
    """
    unet = getattr(pipeline, "unet", None)
    if unet is None:
        raise UnsupportedModelError(
            f"Expected a pipeline with a U-Net, {type(pipeline).__name__} has none. Transformers "
            f"(SD3, FLUX) are not supported."
        )
    if isinstance(unet, BundleUNet):
        raise ConfigError("This pipeline has a bundle already. detach(pipeline) takes it out.")
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    _require_same_model(unet, opened)
    own = getattr(pipeline, "controlnet", None)
    controls = _control_stand_in(own, opened)
    session = Session.open(opened, preset=preset, **options)
    standing_in = BundleUNet(session, pipeline)
    made: dict[str, Any] = {"unet": standing_in}
    if controls is not None:
        standing_in.replaced["controlnet"] = own
        made["controlnet"] = controls
    if not keep_scheduler:
        made["scheduler"] = _scheduler_of(session.preset)
        _tell_of_replacing(pipeline.scheduler, session.preset)
    pipeline.register_modules(**made)
    return standing_in


def detach(pipeline: Any) -> None:
    """Give a pipeline its own U-Net and scheduler back, and close the session.

    Raises:
        ConfigError: no bundle is attached.
    """
    unet = getattr(pipeline, "unet", None)
    if not isinstance(unet, BundleUNet):
        raise ConfigError(
            f"Expected a pipeline with a bundle, its U-Net is a {type(unet).__name__}."
        )
    unet.close()
    pipeline.register_modules(**unet.replaced)


def _scheduler_of(preset: Preset) -> SchedulerMixin:
    """The scheduler that a preset was measured with."""
    recorded = recorded_solver(preset.solver)
    if not isinstance(recorded, DiffusersScheduler):
        return PresetScheduler.of(preset)
    kind: Any = getattr(diffusers, recorded.scheduler, None)
    if SchedulerMixin not in getattr(kind, "__mro__", ()):
        raise ConfigError(
            f"Preset {preset.name!r} runs {recorded.scheduler}, which diffusers "
            f"{diffusers.__version__} does not have. Install the version that it was compiled with."
        )
    made: SchedulerMixin = kind.from_config(dict(recorded.config))
    return made


def _tell_of_replacing(own: Any, preset: Preset) -> None:
    """Say what runs in place of a scheduler that no solver of ours is, such as SD1.5's PNDM."""
    kind, recorded = type(own).__name__, recorded_solver(preset.solver)
    runs = recorded.scheduler if isinstance(recorded, DiffusersScheduler) else recorded.solver
    ours = bool(solver_of({"_class_name": kind})) and kind != "PNDMScheduler"
    if not ours and runs != kind:
        logging.getLogger("blockcache").warning(
            "attach: %s of preset %r runs in place of the pipeline's %s until detach. To run %s "
            "itself, compile --preset %s:%d and attach that.",
            runs, preset.name, kind, kind, kind, preset.replaced_steps,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Controls:
    """What a pipeline gives its ControlNets at a step, on the way to the bundle's U-Net."""

    pictures: tuple[torch.Tensor, ...]  # per ControlNet [N, 3, H, W], 0 to 1
    scales: tuple[float, ...]

    def conditions(self) -> dict[str, torch.Tensor]:
        """As the session takes them, by name."""
        found = {}
        for index, (picture, scale) in enumerate(zip(self.pictures, self.scales, strict=True)):
            names = control_names(index)
            found[names[0]] = picture
            found[names[1]] = torch.tensor([[scale, LAST_TIMESTEP, -LAST_TIMESTEP]])
        return found


class BundleControlNet(ControlNetModel):
    """Stands where a pipeline's ControlNet stood; the network itself runs in the bundle."""

    def __init__(self, original: ControlNetModel) -> None:
        torch.nn.Module.__init__(self)  # without the network
        self.register_to_config(**original.config)
        anchor = torch.zeros(0, dtype=original.dtype, device=original.device)
        self.register_buffer("_anchor", anchor, persistent=False)  # moves with pipeline.to(...)

    def forward(
        self,
        *_: Any,
        controlnet_cond: torch.Tensor,
        conditioning_scale: float = 1.0,
        guess_mode: bool = False,
        **__: Any,
    ) -> tuple[_Controls, _Controls]:
        """What the U-Net takes for residuals.

        Raises:
            UnsupportedModelError: ``guess_mode``.
        """
        _refuse_guess_mode(guess_mode)
        given = _Controls((controlnet_cond,), (float(conditioning_scale),))
        return given, given


class BundleControlNets(MultiControlNetModel):
    """The same for several ControlNets."""

    def __init__(self, originals: Sequence[ControlNetModel]) -> None:
        super().__init__([BundleControlNet(original) for original in originals])

    def forward(
        self,
        *_: Any,
        controlnet_cond: Sequence[torch.Tensor],
        conditioning_scale: Sequence[float],
        guess_mode: bool = False,
        **__: Any,
    ) -> tuple[_Controls, _Controls]:
        """What the U-Net takes for residuals.

        Raises:
            UnsupportedModelError: ``guess_mode``.
        """
        _refuse_guess_mode(guess_mode)
        given = _Controls(tuple(controlnet_cond), tuple(map(float, conditioning_scale)))
        return given, given


def _refuse_guess_mode(guess_mode: bool) -> None:
    if guess_mode:
        raise UnsupportedModelError(
            "guess_mode: a bundle's ControlNets act on both halves of guidance alike, with one "
            "scale for all layers. Draw without it; detach(pipeline) gives the pipeline's own back."
        )


def _control_stand_in(own: Any, bundle: Bundle) -> BundleControlNet | BundleControlNets | None:
    """What takes the place of a pipeline's ControlNets, which are as many as the bundle's."""
    nets = list(own.nets) if isinstance(own, MultiControlNetModel) else [own] * (own is not None)
    wanted = controlnet_count(bundle.model)
    others = [type(net).__name__ for net in nets if type(net) is not ControlNetModel]
    if others:
        raise UnsupportedModelError(
            f"Expected ControlNets of class ControlNetModel, this pipeline has a {others[0]}, "
            f"which cannot be compiled."
        )
    if len(nets) != wanted:
        raise UnsupportedModelError(
            f"Expected a pipeline with {wanted} ControlNets, as {bundle.folder} was compiled with, "
            f"got one with {len(nets)}. "
            + (
                "Compile the model with them: --controlnet FOLDER."
                if len(nets) > wanted
                else "Draw with StableDiffusionControlNetPipeline, or compile the model without."
            )
        )
    if isinstance(own, MultiControlNetModel):
        return BundleControlNets(nets)
    return BundleControlNet(nets[0]) if nets else None


class BundleUNet(torch.nn.Module):
    """A session that is called as diffusers calls a ``UNet2DConditionModel``.

    It serves one run of the pipeline at a time. A run may begin at any step (image-to-image), and
    may change its batch or its prompts midway: what is reused then begins anew at that step.
    """

    _anchor: torch.Tensor
    _pipeline: Any

    def __init__(self, session: Session, pipeline: Any) -> None:
        super().__init__()
        original = pipeline.unet
        self.session = session
        self.replaced = {"unet": original, "scheduler": pipeline.scheduler}
        self.config = original.config
        if hasattr(original, "add_embedding"):  # SDXL's pipeline asks for the width of its ids
            width = original.add_embedding.linear_1.in_features
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))
        anchor = torch.zeros(0, dtype=original.dtype, device=original.device)
        self.register_buffer("_anchor", anchor, persistent=False)  # moves with pipeline.to(...)
        object.__setattr__(self, "_pipeline", pipeline)  # no module of this one
        self._request: OpenRequest | None = None
        self._last: tuple[int, torch.Size, dict[str, torch.Tensor]] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the pipeline's tensors; the bundle has its own."""
        return self._anchor.dtype

    @property
    def device(self) -> torch.device:
        """Of the pipeline's tensors."""
        return self._anchor.device

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> UNet2DConditionOutput | tuple[torch.Tensor]:
        """One evaluation, with the arguments of ``UNet2DConditionModel.forward``.

        Raises:
            UnsupportedModelError: an argument that the bundle has no place for.
            InputError: the scheduler runs other timesteps than the preset.
        """
        controls = others.get("down_block_additional_residuals")
        if isinstance(controls, _Controls):
            others = {name: value for name, value in others.items() if value is not controls}
        for name, value in others.items():
            given = any(value.values()) if isinstance(value, Mapping) else value is not None
            if given:
                raise UnsupportedModelError(
                    f"{_NO_PLACE.get(name, name)}: this bundle was compiled without. "
                    f"detach(pipeline) gives the pipeline's own U-Net back."
                )
        conditions = dict(added_cond_kwargs or {})
        if class_labels is not None:
            conditions[CLASSES] = class_labels
        sample, pictures = self._parted(sample)
        conditions |= pictures
        if isinstance(controls, _Controls):
            conditions |= controls.conditions()
        step = self._step(float(timestep))
        request = self._request_of(step, sample.shape, encoder_hidden_states, conditions)
        output = self._to_torch(request.predict(step, self._to_session(sample)), sample)
        if step == self.session.steps - 1:
            request.end()
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)

    def close(self) -> None:
        """End the run that was interrupted, if any, and close the session."""
        if self._request is not None:
            self._request.end()
        self.session.close()

    # -- steps and requests --------------------------------------------------------------------

    @property
    def _last_step(self) -> int:
        """The last step of the open request; -1 where there is none."""
        is_open = self._request is not None and self._request.is_open
        return self._last[0] if is_open and self._last is not None else -1

    def _step(self, timestep: float) -> int:
        """Where the scheduler is. It knows it; only DDIM's and its like do not count."""
        scheduler, mine = self._pipeline.scheduler, self.session.timesteps
        theirs = np.asarray(torch.as_tensor(scheduler.timesteps).double().cpu())
        if theirs.shape != mine.shape or not np.allclose(theirs, mine, atol=1e-3):
            raise InputError(_other_timesteps(self.session.preset, mine, theirs, scheduler))
        index = getattr(scheduler, "step_index", None)
        if index is None:
            index = getattr(scheduler, "begin_index", None)
        if index is None:  # it does not count: of equal timesteps the next one that is to come
            found = np.flatnonzero(np.abs(mine - timestep) <= 1e-3)
            ahead = found[found > self._last_step]
            index = int((ahead if len(ahead) else found)[0]) if len(found) else 0
        if abs(mine[int(index)] - timestep) > 1e-3:
            raise InputError(
                f"timestep: expected {mine[int(index)]:g}, at which the pipeline's scheduler is, "
                f"got {timestep:g}. Has another scheduler been given to this pipeline, or to one "
                f"made from it? attach the bundle to the pipeline that runs."
            )
        return int(index)

    def _request_of(
        self,
        step: int,
        shape: torch.Size,
        prompt_embeds: torch.Tensor,
        conditions: Mapping[str, torch.Tensor],
    ) -> OpenRequest:
        """The open request where this step goes on with it, else another that begins here."""
        now = {"": prompt_embeds, **conditions}
        if self._request is not None and self._request.is_open and self._last is not None:
            last_step, last_shape, before = self._last
            if (step, shape) == (last_step + 1, last_shape) and _equal(now, before):
                self._last = (step, shape, now)
                return self._request
            self._request.end()
        self._request = self.session.begin(
            self._condition("", prompt_embeds),
            conditions={name: self._condition(name, v) for name, v in conditions.items()},
            batch=shape[0],
            height=shape[2],
            width=shape[3],
        )
        self._last = (step, shape, now)
        return self._request

    # -- tensors -------------------------------------------------------------------------------

    def _parted(self, joined: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The sample, and the pictures that a pipeline lays behind its channels, by name."""
        model = self.session.bundle.model
        channels = {"sample": model.channels, **model.extra_channels}
        if joined.ndim != 4 or joined.shape[1] != sum(channels.values()):
            told = " + ".join(f"{count} {name}" for name, count in channels.items())
            raise InputError(
                f"sample: expected [N, {told}, height, width], got {list(joined.shape)}."
            )
        parts = [part.contiguous() for part in torch.split(joined, [*channels.values()], dim=1)]
        return parts[0], dict(zip(model.extra_inputs, parts[1:], strict=True))

    def _condition(self, name: str, values: torch.Tensor) -> Any:
        """Numbers of classes as the engines take them; floats go as they are."""
        specs = {spec.name: spec.dtype for spec in self.session.bundle.model.conditions}
        return values.detach().to(torch.int64) if specs.get(name) == "int64" else values.detach()

    def _to_session(self, sample: torch.Tensor) -> torch.Tensor:
        """On a GPU in the bundle's own dtype, so that it is copied as it is."""
        sample = sample.detach().contiguous()
        if sample.is_cuda:
            sample = sample.to(getattr(torch, self.session.bundle.model.precision))
        return sample

    def _to_torch(self, output: Any, like: torch.Tensor) -> torch.Tensor:
        """A tensor of its own, shaped and typed as the sample."""
        if isinstance(output, np.ndarray):
            return torch.from_numpy(output).to(like.device, like.dtype)
        return torch.utils.dlpack.from_dlpack(output).clone().to(like.dtype)

    # -- what would be lost ----------------------------------------------------------------------

    def load_lora_adapter(self, *_: Any, **__: Any) -> None:
        """Refused: a bundle's weights are those it was compiled with."""
        raise _refused("A LoRA", "fuse it (pipe.fuse_lora(); pipe.unload_lora_weights())")

    load_attn_procs = load_lora_adapter

    def _load_ip_adapter_weights(self, *_: Any, **__: Any) -> None:
        raise _refused("An IP-Adapter", "it cannot be compiled either")

    def enable_freeu(self, *_: Any, **__: Any) -> None:
        """Refused: the graphs are what they were compiled as."""
        raise _refused("FreeU", "it cannot be compiled either")

    def set_attn_processor(self, *_: Any, **__: Any) -> None:
        """Refused: the graphs are what they were compiled as."""
        raise _refused("An attention processor", "it cannot be compiled either")


class PresetScheduler(SchedulerMixin, ConfigMixin):
    """A preset's solver as a diffusers scheduler: the same tables as in ``Session.denoise``."""

    order = 1

    @register_to_config
    def __init__(self, solver: Mapping[str, Any], preset: str, replaced_steps: int) -> None:
        config = SolverConfig.from_json(solver)
        self._tables: SolverTables = solver_tables(config)
        self._preset, self._steps = preset, (config.steps, replaced_steps)
        self.register_to_config(
            num_train_timesteps=config.noise.train_timesteps, prediction_type=config.prediction
        )
        self.init_noise_sigma = float(self._tables.initial_scale)
        self.timesteps = torch.from_numpy(self._tables.timesteps)
        self.begin_index: int | None = None
        self.step_index: int | None = None
        self._past: tuple[torch.Tensor, ...] = ()  # x0 of the last two steps, the latest first

    @classmethod
    def of(cls, preset: Preset) -> PresetScheduler:
        """The scheduler that a preset was measured with."""
        made: PresetScheduler = cls(dict(preset.solver), preset.name, preset.replaced_steps)
        return made

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, **_: Any
    ) -> None:
        """Begin a run; InputError for another number of steps than the preset's."""
        if num_inference_steps not in self._steps:
            steps = self._steps[-1]
            raise InputError(
                f"num_inference_steps: expected {steps}, the steps of preset {self._preset!r}, got "
                f"{num_inference_steps}. Pass num_inference_steps={steps}, or compile a preset of "
                f"{num_inference_steps} steps and attach it."
            )
        self.timesteps = torch.from_numpy(self._tables.timesteps).to(device)
        self.begin_index = self.step_index = None
        self._past = ()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The first step of an image-to-image run."""
        self.begin_index = begin_index

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The sample as the model takes it."""
        return sample * float(self._tables.input_scale[self._at()])

    def step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *,
        generator: Any = None, return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:  # fmt: skip
        """Go to the next noise level, in float32; noise that a solver adds is the generator's."""
        at, tables = self._at(), self._tables
        table = (tables.first, tables.second, tables.coefficients)[len(self._past)]
        row, now, output = table[at].tolist(), sample.float(), model_output.float()
        following = row[0] * now + row[1] * output
        for coefficient, x0 in zip(row[2:4], self._past, strict=False):
            following = following + coefficient * x0
        if row[7]:
            noise = randn_tensor(now.shape, generator, now.device, now.dtype)
            following = following + row[7] * noise
        self._past, self.step_index = (row[4] * now + row[5] * output, *self._past[:1]), at + 1
        following = following.to(sample.dtype)
        return SchedulerOutput(prev_sample=following) if return_dict else (following,)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: Any
    ) -> torch.Tensor:
        """What an image-to-image run begins with, at the level of its first step."""
        signal, level = map(float, self._tables.noising[self._at()])
        return signal * original_samples + level * noise

    def _at(self) -> int:
        return self.step_index if self.step_index is not None else self.begin_index or 0

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)


def _equal(now: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor]) -> bool:
    """Whether the conditions are the same; pipelines pass the same tensors at every step."""
    return now.keys() == before.keys() and all(
        value is before[name] or torch.equal(value, before[name]) for name, value in now.items()
    )


def _refused(what: str, way: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{what} would have no effect: the bundle runs what it was compiled from. "
        f"detach(pipeline) first; to have it in a bundle, {way} and compile that model."
    )


def _require_same_model(unet: Any, bundle: Bundle) -> None:
    """Refuse a U-Net that is not the one that the bundle was made from, as far as can be told."""
    if getattr(unet, "_hf_peft_config_loaded", False):
        raise UnsupportedModelError(
            "A LoRA is loaded in this pipeline's U-Net and would be lost: the bundle runs the "
            "weights that it was compiled with. Fuse it (pipe.fuse_lora(); "
            "pipe.unload_lora_weights()), save the pipeline and compile that."
        )
    if getattr(unet, "encoder_hid_proj", None) is not None and bundle.unet_config.get(
        "encoder_hid_dim_type"
    ) != dict(unet.config).get("encoder_hid_dim_type"):
        raise UnsupportedModelError(
            "An IP-Adapter is loaded in this pipeline's U-Net and would be lost. Unload it "
            "(pipe.unload_ip_adapter()), then attach."
        )
    theirs, mine = dict(unet.config), bundle.unet_config
    other = [name for name, value in mine.items() if _listed(theirs.get(name)) != _listed(value)]
    if other:
        raise UnsupportedModelError(
            f"Expected the U-Net that {bundle.folder} was compiled from ({bundle.model.name!r}), "
            f"this one has another {', '.join(other)}. Compile this pipeline's model."
        )


def _listed(value: Any) -> Any:
    """As JSON has it."""
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value


def _other_timesteps(preset: Preset, mine: np.ndarray, theirs: np.ndarray, scheduler: Any) -> str:
    kind = type(scheduler).__name__
    return (
        f"timesteps: expected the {len(mine)} of preset {preset.name!r} ({_few(mine)}), the "
        f"pipeline's {kind} runs {len(theirs)} ({_few(theirs)}). Attach without keep_scheduler, "
        f"give the pipeline a scheduler with these timesteps, or compile a preset that runs this "
        f"one (--preset {kind}:STEPS) and attach that."
    )


def _few(values: np.ndarray) -> str:
    return ", ".join(f"{value:g}" for value in values[:3]) + ", ..."
