"""The data that flows from the exporter to the runtime: shapes, segments, schedules, presets.

All types are frozen and validated when they are made. S steps, K blocks, N C H W as usual.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal, TypeAlias

import numpy as np

from blockcache.runtime.errors import ConfigError
from blockcache.runtime.provenance import Provenance

AXES = ("batch", "height", "width", "tokens")
"""The sizes a tensor may depend on: engine batch, latent height and width, prompt length."""

MOST_SIZE = 1 << 16
"""Nothing along an axis is longer than this; what claims to be is damaged."""

CONTROL_SCALE = "control_scale"
"""How the conditions that say how strongly a ControlNet acts begin: float32 [N, 3], the scale, and
the timesteps between which it holds, the greater first."""

LAST_TIMESTEP = 1e6
"""Greater than any timestep."""

WHOLE = -1
"""The cut behind the last convolution: its branch is the whole U-Net."""

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}

Role: TypeAlias = Literal[
    "trunk", "block", "prompt", "condition", "time", "whole", "text_encoder", "decoder", "encoder"
]
ROLES: tuple[Role, ...] = ("trunk", "block", "prompt", "condition", "time", "whole")
"""Of the U-Net's segments."""
PART_ROLES: tuple[Role, ...] = ("text_encoder", "decoder", "encoder")
"""Of what stands beside the U-Net in a pipeline."""
IMAGE_LATENTS = "image_latents"
"""The extra input of InstructPix2Pix, which guidance may weigh by itself."""
LOOP_ROLES: tuple[Role, ...] = ("condition", "trunk", "block")


def block_output_name(k: int) -> str:
    """The boundary tensor C_k, the output of block k computed last."""
    return f"block_{k}"


def previous_output_name(k: int) -> str:
    """The output of block k computed before the last one (alignment with history only)."""
    return f"block_{k}_before"


def control_names(index: int) -> tuple[str, str]:
    """The conditions of a ControlNet, its picture and its scale; ``index`` counts from 0.

    Examples:
        >>> control_names(0), control_names(1)
        (('control_image', 'control_scale'), ('control_image_2', 'control_scale_2'))
    """
    suffix = f"_{index + 1}" if index else ""
    return f"control_image{suffix}", f"{CONTROL_SCALE}{suffix}"


def coefficient_names(k: int, outputs: int) -> tuple[str, ...]:
    """Table inputs of block k, in the order of the rows of ``Alignment.tables[k]``."""
    names = (f"scale_{k}", f"before_{k}", f"shift_{k}")
    return names if outputs == 2 else (names[0], names[2])


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A value for every axis; hashable, so that it can be a key.

    Examples:
        >>> sizes = Sizes(batch=2, height=64, width=96, tokens=77)
        >>> str(sizes.for_images(4, guided=True))
        'batch 8, height 64, width 96, tokens 77'
    """

    batch: int  # the engines': with guidance two for each image
    height: int  # of the latents
    width: int
    tokens: int  # of the prompt

    def __post_init__(self) -> None:
        for axis in AXES:
            size = getattr(self, axis)
            if type(size) is not int or not 1 <= size <= MOST_SIZE:
                raise ConfigError(
                    f"Expected a {axis} of 1 to {MOST_SIZE}, a whole number; got {size!r}."
                )

    def along(self, axis: str) -> int:
        """The size along one of ``AXES``."""
        return int(getattr(self, axis))

    def for_images(self, images: int, *, guided: bool) -> Sizes:
        """The same for so many images; guidance runs each of them twice."""
        return replace(self, batch=2 * images if guided else images)

    def to_json(self) -> dict[str, int]:
        """By axis, in the order of ``AXES``."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: object) -> Sizes:
        """The inverse of ``to_json``; ConfigError where an axis is missing, unknown or wrong."""
        if not isinstance(content, Mapping) or set(content) != set(AXES):
            raise ConfigError(f"Expected sizes with a value for each of {AXES}, got {content!r}.")
        return cls(**content)

    def __str__(self) -> str:
        return ", ".join(f"{axis} {size}" for axis, size in self.to_json().items())


@dataclass(frozen=True)
class Dim:
    """One dimension as a monomial: ``coefficient * axis * axis ...``.

    Examples:
        >>> Dim.parse("height/4").value(Sizes(batch=2, height=64, width=64, tokens=77))
        16
        >>> str(Dim(Fraction(8), ("batch",)))
        '8*batch'
    """

    coefficient: Fraction
    axes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.coefficient <= 0:
            raise ConfigError(f"A dimension is positive; got the coefficient {self.coefficient}.")
        if any(axis not in AXES for axis in self.axes):
            raise ConfigError(f"A dimension depends on {AXES} only; got {self.axes}.")

    def value(self, sizes: Sizes) -> int:
        """The dimension at ``sizes``; ConfigError where it is no whole number."""
        product = self.coefficient
        for axis in self.axes:
            product *= sizes.along(axis)
        if product.denominator != 1:
            raise ConfigError(
                f"The dimension {self} must be a whole number; it is {product} for {sizes}. "
                f"Choose sizes divisible by the model's downsampling factor."
            )
        return int(product)

    @classmethod
    def parse(cls, text: str | int) -> Dim:
        """Read ``"8*batch"``, ``"height*width/16"`` or a number."""
        match = re.fullmatch(r"([a-z0-9*]+)(?:/([1-9][0-9]*))?", str(text))
        if not match:
            raise ConfigError(f"Expected a dimension such as 'height*width/16', got {text!r}.")
        factors = match.group(1).split("*")
        coefficient = Fraction(1, int(match.group(2) or 1))
        axes = []
        for factor in factors:
            if factor.isdigit():
                coefficient *= int(factor)
            else:
                axes.append(factor)
        return cls(coefficient, tuple(sorted(axes)))

    def __str__(self) -> str:
        number = self.coefficient.numerator
        factors = ([str(number)] if number != 1 or not self.axes else []) + list(self.axes)
        over = self.coefficient.denominator
        return "*".join(factors) + (f"/{over}" if over != 1 else "")


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and symbolic shape of a tensor that enters or leaves a segment."""

    name: str
    dtype: str
    dims: tuple[Dim, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(
                f"Tensor {self.name!r}: expected a dtype of {sorted(DTYPE_BYTES)}, "
                f"got {self.dtype!r}."
            )

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """The concrete shape at ``sizes``."""
        return tuple(dim.value(sizes) for dim in self.dims)

    def bytes(self, sizes: Sizes) -> int:
        """The size in bytes at ``sizes``."""
        return DTYPE_BYTES[self.dtype] * int(np.prod(self.shape(sizes), dtype=np.int64))


def default_condition(name: str) -> np.ndarray | None:
    """A condition that may be left out, float32 [1, ...]; None for all others.

    A ControlNet acts fully and at every step.
    """
    if name.startswith(CONTROL_SCALE):
        return np.array([[1.0, LAST_TIMESTEP, -LAST_TIMESTEP]], np.float32)
    return None


def default_negative(name: str, values: np.ndarray) -> np.ndarray | None:
    """What diffusers feeds guidance's unconditional half for a condition that is not given.

    Pictures [N, C, H, W], sizes (``time_ids``), class numbers and scales of ControlNets are those
    of the prompt. An image embedding (unCLIP's ``class_labels``, float [N, width]) is zeros.
    Prompts have no default: None.
    """
    if name == "class_labels" and values.ndim == 2:
        return np.zeros_like(values)
    plain = name in ("class_labels", "time_ids") or name.startswith(CONTROL_SCALE)
    return values if values.ndim == 4 or plain else None


@dataclass(frozen=True)
class Segment:
    """One ONNX subgraph, which becomes one engine.

    Roles: ``condition``, ``trunk`` and ``block`` run in the denoising loop, in the order of the
    bundle's list; ``prompt`` runs once per image; ``time`` runs offline, once per preset;
    ``whole`` is the uncut model, for comparison. ``text_encoder``, ``decoder`` and ``encoder`` are
    whole models of their own, see ``PipelineFacts``.
    """

    name: str
    role: Role
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    block: int | None = None  # index k in 0..K-1 for role "block"
    flops: int = 0  # multiply-adds counted as two, at the model's default sizes

    def __post_init__(self) -> None:
        if self.role not in (*ROLES, *PART_ROLES):
            raise ConfigError(
                f"Segment {self.name!r}: role {self.role!r} is none of {(*ROLES, *PART_ROLES)}."
            )
        if (self.role == "block") != (self.block is not None):
            raise ConfigError(f"Segment {self.name!r}: a block, and only a block, has an index.")


@dataclass(frozen=True, kw_only=True)
class PipelineFacts:
    """What a bundle holds beside the U-Net, so that it draws pictures from prompts.

    Parts are segments that run once a request, each a whole model: text encoders read
    ``input_ids`` int64 [N, T], some also ``attention_mask``, and write ``states`` [N, T, D], some
    also ``pooled`` [N, D]; the decoder makes ``image`` float32 [N, 3, H, W] in 0..1 of ``latents``
    float32 [N, C, h, w]; the encoder makes ``latents`` of an ``image`` in -1..1.
    """

    parts: tuple[Segment, ...]
    tokenizers: Mapping[str, str]  # by a text encoder's name: its tokenizer.json in the bundle
    zeros_without_negative: bool = False  # no negative prompt is zeros, not the empty text (SDXL)
    noise_levels: tuple[float, ...] = ()
    """Of an upscaler: at each level from 0 on, the share of the small picture's variance that is
    left; the rest is noise."""

    def of_role(self, role: Role) -> tuple[Segment, ...]:
        """The parts of a role, in their order."""
        return tuple(part for part in self.parts if part.role == role)


@dataclass(frozen=True)
class LoraFacts:
    """A LoRA that was merged into a bundle's weights."""

    name: str  # of its file
    sha256: str  # of its file
    scale: float


@dataclass(frozen=True, eq=False, repr=False)
class Schedule:
    """Which block is recomputed at which step: ``recompute[S, K]``, see eq. 7.

    ``recompute`` is indexed by step number, never by timestep: solver spacings repeat timesteps.
    Schedules compare and hash by their table.

    Examples:
        >>> Schedule.uncached(20, 10)
        Schedule(20 steps, 10 blocks, 100 % computed)
    """

    recompute: np.ndarray  # bool [S, K]

    def __post_init__(self) -> None:
        table = np.asarray(self.recompute)
        if table.dtype != np.bool_ or table.ndim != 2 or 0 in table.shape:
            raise ConfigError(
                f"A schedule is a boolean table [steps, blocks]; got {table.dtype} {table.shape}."
            )
        if not table[0].all():
            missing = np.flatnonzero(~table[0]).tolist()
            raise ConfigError(
                f"Step 0 must recompute every block, there is nothing to reuse yet; "
                f"blocks {missing} are reused there."
            )
        table = table.copy()
        table.setflags(write=False)
        object.__setattr__(self, "recompute", table)

    @property
    def steps(self) -> int:
        """S, the number of denoising steps."""
        return int(self.recompute.shape[0])

    @property
    def blocks(self) -> int:
        """K, the number of blocks."""
        return int(self.recompute.shape[1])

    @classmethod
    def uncached(cls, steps: int, blocks: int) -> Schedule:
        """The schedule that recomputes every block at every step."""
        return cls(np.ones((steps, blocks), np.bool_))

    def started_at(self, start: int) -> Schedule:
        """The schedule of a run whose first executed step is ``start`` (image-to-image).

        The first executed step recomputes all: cache state never outlives a request.
        """
        table = self.recompute[start:].copy()
        table[0] = True
        return Schedule(table)

    def computed_fraction(self, cost: np.ndarray | None = None) -> float:
        """Share of the blocks' work that is done; ``cost`` float [K] weighs the blocks."""
        weight = np.ones(self.blocks) if cost is None else np.asarray(cost, np.float64)
        return float((self.recompute * weight).sum() / (weight.sum() * self.steps))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Schedule):
            return NotImplemented
        return np.array_equal(self.recompute, other.recompute)

    def __hash__(self) -> int:
        return hash((self.recompute.shape, self.recompute.tobytes()))

    def __repr__(self) -> str:
        return f"Schedule({self._facts()})"

    def _facts(self) -> str:
        computed = f"{100 * self.computed_fraction():.0f} % computed"
        return f"{self.steps} steps, {self.blocks} blocks, {computed}"


@dataclass(frozen=True, eq=False, repr=False)
class Alignment:
    """Per block, per step, per channel coefficients of a reused output (section 3.4).

    ``tables[k]`` is float32 [S, A, C_k]. A = 2: rows (scale, shift) and
    ``y = x + scale * C_last + shift``. A = 3: rows (scale, before, shift) and
    ``y = x + scale * C_last + before * C_before + shift``, C_before being the output computed
    before the last one. Alignments compare by their tables and have no hash.

    Examples:
        >>> Alignment.identity(20, (64, 128), outputs=2)
        Alignment(2 blocks, the last 2 outputs)
    """

    tables: tuple[np.ndarray, ...]

    def __post_init__(self) -> None:
        rows = {table.shape[1] for table in self.tables if table.ndim == 3}
        if any(table.ndim != 3 for table in self.tables) or not rows <= {2, 3} or len(rows) > 1:
            shapes = [table.shape for table in self.tables]
            raise ConfigError(f"Alignment tables are float32 [S, 2 or 3, C], alike; got {shapes}.")
        if any(table.dtype != np.float32 for table in self.tables):
            raise ConfigError("Alignment tables are float32.")

    @property
    def outputs(self) -> int:
        """How many computed outputs of a block a reuse may combine: 1, or 2 (history)."""
        return int(self.tables[0].shape[1]) - 1

    @classmethod
    def identity(cls, steps: int, channels: tuple[int, ...], outputs: int = 1) -> Alignment:
        """Scale 1, everything else 0: reuse as it is."""
        tables = []
        for count in channels:
            table = np.zeros((steps, outputs + 1, count), np.float32)
            table[:, 0] = 1.0
            tables.append(table)
        return cls(tuple(tables))

    def combining(self, outputs: int) -> Alignment:
        """The same alignment as tables that combine ``outputs`` outputs, 1 or 2."""
        if outputs == self.outputs:
            return self
        if outputs < self.outputs:
            raise ConfigError(
                f"An alignment that combines {self.outputs} outputs of a block needs segments "
                f"that do; these combine {outputs}. Export with ExportOptions(outputs=2)."
            )
        return Alignment(tuple(np.insert(table, 1, 0.0, axis=1) for table in self.tables))

    def check(self, schedule: Schedule) -> None:
        """Raise ConfigError unless every recomputed entry is the identity."""
        for k, table in enumerate(self.tables):
            if table.shape[0] != schedule.steps:
                raise ConfigError(
                    f"Alignment of block {k} has {table.shape[0]} steps, "
                    f"the schedule has {schedule.steps}."
                )
            fresh = table[schedule.recompute[:, k]]
            if not ((fresh[:, 0] == 1).all() and (fresh[:, 1:] == 0).all()):
                raise ConfigError(
                    f"Alignment of block {k} changes a recomputed output: at recompute steps "
                    f"the scale is 1 and the rest 0."
                )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Alignment):
            return NotImplemented
        return _same_arrays(dict(enumerate(self.tables)), dict(enumerate(other.tables)))

    __hash__ = None  # type: ignore[assignment]  # tables are large, and a preset has a name

    def __repr__(self) -> str:
        used = "the last output" if self.outputs == 1 else "the last 2 outputs"
        return f"Alignment({len(self.tables)} blocks, {used})"


def _same_arrays(ours: Mapping[Any, np.ndarray], theirs: Mapping[Any, np.ndarray]) -> bool:
    """Whether the same names hold equal arrays of the same dtype."""
    return ours.keys() == theirs.keys() and all(
        table.dtype == theirs[name].dtype and np.array_equal(table, theirs[name])
        for name, table in ours.items()
    )


@dataclass(frozen=True)
class BlockFacts:
    """A block, or a branch, as the runtime knows it: where it stands in the source model."""

    path: str  # module path, e.g. "mid_block.attentions.0"; of a branch, of what reads its output
    channels: int  # C_k, of the output
    cut: int | None = None  # of a branch: the skips that lie above it, or ``WHOLE``


@dataclass(frozen=True)
class ModelFacts:
    """What the runtime needs to know about the source model."""

    name: str
    sha256: str  # of the source's config and weights
    precision: str  # dtype of weights and activations
    channels: int  # latent channels
    downsampling: int  # latent height and width are multiples of this
    outputs: int  # computed outputs of a block that a reuse may combine, 1 or 2
    blocks: tuple[BlockFacts, ...]
    sizes: Sizes  # the model's default sizes
    conditions: tuple[TensorSpec, ...]  # what a request gives besides the noise
    extra_inputs: tuple[str, ...] = ()  # conditions whose channels stand behind the sample's
    classes: int = 0  # class_labels are 0..classes-1; 0 where the model takes no such number

    @property
    def extra_channels(self) -> Mapping[str, int]:
        """Channels of the pictures that the U-Net reads beside the sample, in their order."""
        specs = {spec.name: spec for spec in self.conditions}
        return {name: int(specs[name].dims[1].coefficient) for name in self.extra_inputs}

    @property
    def most_rows(self) -> int:
        """How often an image stands in a batch at most: three times where its picture is guided."""
        return 3 if IMAGE_LATENTS in self.extra_inputs else 2

    @property
    def block_channels(self) -> tuple[int, ...]:
        """C_k of every block."""
        return tuple(block.channels for block in self.blocks)


def controlnet_count(model: ModelFacts) -> int:
    """How many ControlNets a bundle was compiled with."""
    return sum(spec.name.startswith(CONTROL_SCALE) for spec in model.conditions)


def row_specs(model: ModelFacts, segments: Iterable[Segment]) -> tuple[TensorSpec, ...]:
    """Inputs of the loop that change with the step number alone: the fields of the step's row.

    That is, what neither a segment produces nor a request brings: hoisted time projections and
    alignment coefficients.
    """
    loop = [segment for segment in segments if segment.role in (*LOOP_ROLES, "prompt")]
    brought = {spec.name for segment in loop for spec in segment.outputs} | {"sample"}
    brought |= {spec.name for spec in model.conditions}
    brought |= {previous_output_name(k) for k in range(len(model.blocks))}
    inputs = {spec.name: spec for segment in loop for spec in segment.inputs}
    return tuple(spec for name, spec in inputs.items() if name not in brought)


def preset_name(text: str) -> str:
    """The name of a preset written as for the compiler (``dpm:20:0.5``); a name stays as it is.

    Examples:
        >>> preset_name("dpm:20:0.5"), preset_name("dpm-20-0.5"), preset_name("dpm-20-d0.5")
        ('dpm-20-d0.5', 'dpm-20-d0.5', 'dpm-20-d0.5')
        >>> preset_name("dpm-karras:20:blocks:max:history")
        'dpm-karras-20-blocksmax-history'
    """
    match = re.fullmatch(r"([a-z][a-z0-9-]*?)[:-]([0-9]+)[:-](.+)", text)
    if match is None:
        return text.replace(":", "-")
    solver, steps, rest = match.groups()  # a grid's name is part of the solver: "dpm-ays-sd15"
    rest = re.sub(r"^([a-z]+):max(?=:|$)", r"\1max", rest).replace(":", "-").removesuffix("-none")
    delta = "d" if rest[:1] in "0123456789." else ""
    return f"{solver}-{steps}-{delta}{rest}"


@dataclass(frozen=True, eq=False, repr=False)
class Preset:
    """Solver, steps, schedule and alignment: one way to denoise with a bundle.

    Presets compare by value, tables included, and have no hash: use the name as a key.
    """

    name: str
    solver: Mapping[str, object]  # SolverConfig.to_json()
    schedule: Schedule
    alignment: Alignment
    time_tables: Mapping[str, np.ndarray]  # tensor name -> float32 [S, ...]: hoisted projections
    guidance_scale: float = 1.0
    provenance: Provenance = field(default_factory=Provenance)  # how it was made

    @property
    def replaced_steps(self) -> int:
        """Step count of the uncached run that this preset replaces; a joint policy takes fewer."""
        return self.provenance.replaced_steps or self.schedule.steps

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ConfigError(
                f"A preset's name is made of letters, digits, '.', '_' and '-'; got {self.name!r}."
            )
        if len(self.alignment.tables) != self.schedule.blocks:
            raise ConfigError(
                f"Preset {self.name!r}: {self.schedule.blocks} blocks in the schedule, "
                f"{len(self.alignment.tables)} in the alignment."
            )
        self.alignment.check(self.schedule)
        if self.solver.get("steps", self.schedule.steps) != self.schedule.steps:
            raise ConfigError(
                f"Preset {self.name!r}: the solver takes {self.solver['steps']} steps, "
                f"the schedule has {self.schedule.steps}."
            )
        for name, table in self.time_tables.items():
            if table.shape[0] != self.schedule.steps:
                raise ConfigError(
                    f"Preset {self.name!r}: time table {name!r} has {table.shape[0]} rows, "
                    f"expected one a step ({self.schedule.steps})."
                )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Preset):
            return NotImplemented
        return self._plain() == other._plain() and _same_arrays(self.time_tables, other.time_tables)

    __hash__ = None  # type: ignore[assignment]

    def _plain(self) -> tuple[object, ...]:
        solver = dict(self.solver)
        plain = (self.name, solver, self.guidance_scale, self.provenance)
        return (*plain, self.schedule, self.alignment)

    def __repr__(self) -> str:
        return f"Preset({self.name!r}, {self.schedule._facts()})"
