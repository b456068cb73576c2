"""Whether a bundle's parts agree: segments with each other, with their graphs, with the presets.

What a segment reads decides its role, so that no role can be mistaken for another:

=============  =================================================  ================================
role           reads                                              writes
=============  =================================================  ================================
``time``       the timestep                                       rows: one a step
``prompt``     conditions                                         conditions that are projected
``condition``  rows, or the timestep as one, and conditions       both in one
``trunk``      what depends on the sample, and all of the above   tensors that do; model output
``block``      the same                                           its output, ``block_<k>``
(a branch)     a ``trunk`` that ends one                          its output, ``block_<k>``
``whole``      sample, timestep, conditions                       model output
=============  =================================================  ================================

A tensor is written once, before it is read, and has one dtype and shape wherever it is named.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Literal, TypeAlias

import numpy as np

from blockcache.runtime.bundles.manifest import PresetEntry
from blockcache.runtime.bundles.onnx_signature import OnnxSignature
from blockcache.runtime.errors import BundleFormatError, ConfigError
from blockcache.runtime.plan import (
    LOOP_ROLES,
    Dim,
    ModelFacts,
    PipelineFacts,
    Preset,
    Role,
    Segment,
    TensorSpec,
    block_output_name,
    coefficient_names,
    previous_output_name,
    row_specs,
)
from blockcache.runtime.run_table import blocks_share
from blockcache.runtime.solvers.recorded import recorded_solver, timesteps_of
from blockcache.runtime.solvers.solver import SolverConfig, solver_tables

MOST_TENSOR_BYTES = 1 << 34
"""Of a tensor at the model's default sizes; SDXL's largest takes 42 MB."""

_Kind: TypeAlias = Literal["timestep", "row", "condition", "both", "sample"]
"""What a tensor depends on."""

_MAY_READ: dict[Role, tuple[_Kind, ...]] = {
    "time": ("timestep",),
    "prompt": ("condition",),
    "condition": ("row", "both", "condition", "timestep"),
    "trunk": ("sample", "row", "both", "condition"),
    "block": ("sample", "row", "both", "condition"),
    "whole": ("sample", "timestep", "condition"),
}
_MUST_READ: dict[Role, tuple[_Kind, ...]] = {
    "time": ("timestep",),
    "prompt": ("condition",),
    "condition": ("row", "both", "timestep"),
    "trunk": ("sample",),
    "block": ("sample",),
    "whole": ("sample",),
}
_WRITES: dict[Role, _Kind] = {
    "time": "row",
    "prompt": "condition",
    "condition": "both",
    "trunk": "sample",
    "block": "sample",
    "whole": "sample",
}

_ONE, _BATCH = Dim.parse(1), Dim.parse("batch")
_TOKEN_INPUTS = ("input_ids", "attention_mask")
_RESERVED = ("latents", "past_x0")  # tensors of the runtime's own


def _require(right: bool, where: str, wanted: str, got: object) -> None:
    if not right:
        raise BundleFormatError(f"{where}: expected {wanted}, got {got}. Compile the model again.")


def _shown(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.dtype} [{', '.join(map(str, spec.dims))}]"


# -- segments --------------------------------------------------------------------------------------


def check_segments(model: ModelFacts, segments: Sequence[Segment]) -> None:
    """Raise BundleFormatError unless the segments, run in their order, make the model.

    Args:
        model: Its blocks, conditions and latent channels.
        segments: In running order.
    """
    _check_names(model, segments)
    _check_sizes(model, segments)
    before_loop = [s for role in ("time", "prompt") for s in segments if s.role == role]
    known = _Known(model, hoisted=any(segment.role == "time" for segment in segments))
    for segment in segments:
        if segment.role == "whole":
            _Known(model, hoisted=True).run(segment)
    for segment in (*before_loop, *(s for s in segments if s.role in LOOP_ROLES)):
        known.run(segment)
    known.check_end()


def _check_names(model: ModelFacts, segments: Sequence[Segment]) -> None:
    """Names and files stand once, blocks are 0..K-1 in this order, single roles are single."""
    for what, names in (
        ("segments", [segment.name for segment in segments]),
        ("segments", [segment.file for segment in segments]),
        ("model.blocks", [f"{block.path} {block.cut}" for block in model.blocks]),
        ("model.conditions", [spec.name for spec in model.conditions]),
    ):
        twice = sorted({name for name in names if names.count(name) > 1})
        _require(not twice, what, "each name and file once", f"{twice} again")
    indices = [segment.block for segment in segments if segment.role == "block"]
    cuts = [block.cut for block in model.blocks if block.cut is not None]
    last = [block.cut for block in model.blocks[len(model.blocks) - len(cuts) :]]
    right = cuts == last == sorted(set(cuts))
    _require(right, "model.blocks", "branches last, the shallowest first", cuts)
    wanted = list(range(len(model.blocks) - len(cuts)))
    right = bool(wanted) and indices == wanted
    _require(right, "segments", f"the blocks {wanted} in this order", indices)
    folders = sorted({str(PurePosixPath(segment.file).parent) for segment in segments})
    _require(len(folders) == 1, "segments", "files in one folder, with their weights", folders)
    for role in ("time", "whole"):
        count = sum(segment.role == role for segment in segments)
        _require(count <= 1, "segments", f"at most one of role {role!r}", count)


def _check_sizes(model: ModelFacts, segments: Sequence[Segment]) -> None:
    """Every tensor has whole dimensions and a plausible size at the model's default sizes."""
    specs = {spec for segment in segments for spec in (*segment.inputs, *segment.outputs)}
    for spec in sorted(specs | set(model.conditions), key=_shown):
        try:
            count = spec.bytes(model.sizes)
        except ConfigError as error:
            raise BundleFormatError(f"Tensor {spec.name!r}: {error} Compile again.") from error
        wanted = f"at most {MOST_TENSOR_BYTES} bytes at {model.sizes}"
        _require(0 < count <= MOST_TENSOR_BYTES, f"Tensor {spec.name!r}", wanted, count)


class _Known:
    """The tensors that a segment may read; grows with every segment that runs."""

    def __init__(self, model: ModelFacts, *, hoisted: bool) -> None:
        spatial = (_BATCH, Dim.parse(model.channels), Dim.parse("height"), Dim.parse("width"))
        self._model = model
        self._branches = {
            block_output_name(k): k for k, b in enumerate(model.blocks) if b.cut is not None
        }
        self._sample = TensorSpec("sample", model.precision, spatial)
        self._tensors: dict[str, tuple[_Kind, TensorSpec]] = {}
        self._read: set[str] = set()
        timestep = TensorSpec("timestep", "float32", (_BATCH,))
        self._add(timestep, "timestep" if hoisted else "row", "model")
        self._add(self._sample, "sample", "model")
        for spec in model.conditions:
            self._add(spec, "condition", "model.conditions")

    def run(self, segment: Segment) -> None:
        """Check what a segment reads, then add what it writes."""
        where = f"Segment {segment.name!r}"
        names = [spec.name for spec in segment.inputs]
        _require(len(set(names)) == len(names), where, "each input once", names)
        kinds = {self._check_input(segment, spec) for spec in segment.inputs}
        must = _MUST_READ[segment.role]
        wanted = f"role {segment.role!r} to read a tensor of kind {' or '.join(must)}"
        _require(bool(kinds & set(must)), where, wanted, names)
        self._read.update(names)
        branches = [self._branches[o.name] for o in segment.outputs if o.name in self._branches]
        if segment.block is not None:
            self._add_kept(segment, segment.block, where)
        elif segment.role == "trunk" and branches:
            self._add_kept(segment, branches[0], where)
        else:
            for spec in segment.outputs:
                self._add_output(segment, spec, where)

    def check_end(self) -> None:
        """The model's output is there, and everything that is written is read."""
        _require("model_output" in self._tensors, "segments", "one to write model_output", "none")
        unwritten = sorted(self._branches.keys() - self._tensors.keys())
        _require(not unwritten, "segments", "every branch to end in one", f"no {unwritten}")
        unread = self._tensors.keys() - self._read - {"model_output", "timestep"}
        _require(not unread, "segments", "every tensor to be read", f"none for {sorted(unread)}")

    def _check_input(self, segment: Segment, spec: TensorSpec) -> _Kind:
        where = f"Segment {segment.name!r}, input {spec.name!r}"
        _require(spec.name in self._tensors, where, "a tensor written before", "one that is not")
        kind, wanted = self._tensors[spec.name]
        _require(spec == wanted, where, _shown(wanted), _shown(spec))
        may = _MAY_READ[segment.role]
        _require(kind in may, where, f"role {segment.role!r} to read {may}", f"kind {kind!r}")
        return kind

    def _add(self, spec: TensorSpec, kind: _Kind, where: str) -> None:
        taken = spec.name in self._tensors or spec.name in _RESERVED
        _require(not taken, where, "to write tensors of new names", f"{spec.name!r} again")
        self._tensors[spec.name] = (kind, spec)

    def _add_output(self, segment: Segment, spec: TensorSpec, where: str) -> None:
        if spec.name == "model_output":
            wanted = replace(self._sample, name=spec.name)
            _require(spec == wanted, where, f"the output {_shown(wanted)}", _shown(spec))
        elif segment.role == "whole":
            _require(False, where, "the output model_output alone", _shown(spec))
        if segment.role == "time":  # all steps at once offline, one row an image in the loop
            batched = len(spec.dims) > 1 and spec.dims[0] == _BATCH
            _require(batched, where, "rows [batch, ...]", _shown(spec))
        self._add(spec, _WRITES[segment.role], where)

    def _add_kept(self, segment: Segment, k: int, where: str) -> None:
        """A block's or branch's output, the one before it, and the coefficients of its reuse."""
        channels = self._model.blocks[k].channels
        right = [spec.name for spec in segment.outputs] == [block_output_name(k)]
        wanted = f"the output {block_output_name(k)!r} alone"
        _require(right, where, wanted, [spec.name for spec in segment.outputs])
        output = segment.outputs[0]
        right = len(output.dims) == 4 and output.dims[:2] == (_BATCH, Dim.parse(channels))
        _require(right, where, f"an output [batch, {channels}, ...]", _shown(output))
        self._add(output, "sample", where)
        row = (_BATCH, Dim.parse(channels), _ONE, _ONE)
        for name in coefficient_names(k, self._model.outputs):
            self._add(TensorSpec(name, "float32", row), "row", where)
        if self._model.outputs == 2:
            self._add(replace(output, name=previous_output_name(k)), "sample", where)


# -- graphs ----------------------------------------------------------------------------------------


def check_graph(segment: Segment, graph: OnnxSignature, sizes: Mapping[str, int]) -> None:
    """Raise BundleFormatError unless a segment's graph is what the manifest says.

    Args:
        segment: As the manifest has it.
        graph: As its file has it.
        sizes: Bytes of the files that lie beside it.
    """
    for side in ("inputs", "outputs"):
        said, found = ({spec.name: spec for spec in getattr(of, side)} for of in (segment, graph))
        where = f"Segment {segment.name!r}, {side}"
        _require(said.keys() == found.keys(), where, f"{sorted(found)}", sorted(said))
        for name, spec in said.items():
            _require(spec == found[name], where, f"{_shown(found[name])}", _shown(spec))
        repeated = len(found) != len(getattr(graph, side))
        _require(not repeated, where, "a graph that names each once", "one that does not")
    for weight in graph.weights:
        where = f"{segment.file}, weight {weight.name!r}"
        plain = PurePosixPath(weight.file).name == weight.file and weight.file in sizes
        _require(plain, where, f"a file of {sorted(sizes)}", weight.file[:80])
        end, bytes_there = weight.offset + weight.length, sizes[weight.file]
        _require(
            end <= bytes_there, where, f"bytes up to {bytes_there} of {weight.file}", f"up to {end}"
        )


# -- what stands beside the U-Net ------------------------------------------------------------------


def check_pipeline(model: ModelFacts, segments: Sequence[Segment], pipeline: PipelineFacts) -> None:
    """Raise BundleFormatError unless the parts make the U-Net's prompt, and pictures of latents.

    Args:
        model: Its conditions and latent channels.
        segments: Of the U-Net, whose names and files the parts must not have.
        pipeline: The parts.
    """
    for fact in ("name", "file"):
        names = [getattr(segment, fact) for segment in (*segments, *pipeline.parts)]
        twice = sorted({name for name in names if names.count(name) > 1})
        _require(not twice, f"pipeline, {fact}s", "each once", f"{twice} again")
    for part in pipeline.parts:
        _require(part.flops >= 0 and bool(part.inputs), f"Part {part.name!r}", "inputs", "none")
    _check_encoders(model, pipeline)
    for role in ("decoder", "encoder"):
        parts = pipeline.of_role(role)
        _require(len(parts) < 2, "pipeline", f"at most one part of role {role!r}", len(parts))
        for part in parts:
            _check_autoencoder(model, part)


def _check_encoders(model: ModelFacts, pipeline: PipelineFacts) -> None:
    """Text encoders read tokens, as many each, and together write what the U-Net attends to."""
    encoders = pipeline.of_role("text_encoder")
    names = [part.name for part in encoders]
    _require(sorted(pipeline.tokenizers) == sorted(names), "pipeline.tokenizers",
             f"one for each of {names}", sorted(pipeline.tokenizers))  # fmt: skip
    if not encoders:
        return
    _require(names == sorted(names), "pipeline.parts", "text encoders in their order", names)
    tokens, width = encoders[0].inputs[0].dims[-1], Fraction(0)
    for part in encoders:
        where, outputs = f"Part {part.name!r}", {spec.name: spec for spec in part.outputs}
        shown = [_shown(spec) for spec in part.inputs]
        wanted = [TensorSpec(name, "int64", (_BATCH, tokens)) for name in _TOKEN_INPUTS]
        right = list(part.inputs) in (wanted[:1], wanted) and not tokens.axes
        _require(right, where, "token numbers [batch, tokens], and perhaps a mask of them", shown)
        shown = [_shown(spec) for spec in part.outputs]
        right = "states" in outputs and outputs.keys() <= {"states", "pooled"}
        _require(right, where, "states and perhaps pooled as outputs", shown)
        states = outputs["states"]
        right = states.dims[:-1] == (_BATCH, tokens) and not states.dims[-1].axes
        right = right and states.dtype == model.precision
        _require(right, where, f"states {model.precision} [batch, {tokens}, D]", shown)
        width += states.dims[-1].coefficient
        if "pooled" in outputs:
            pooled = outputs["pooled"]
            right = len(pooled.dims) == 2 and pooled.dims[0] == _BATCH and not pooled.dims[1].axes
            _require(right, where, "pooled [batch, D]", shown)
    prompt = next(c for c in model.conditions if c.name == "encoder_hidden_states")
    _require(width == prompt.dims[-1].coefficient, "pipeline", f"states of {prompt.dims[-1]} "
             f"numbers a token, as the U-Net takes them", width)  # fmt: skip


def _check_autoencoder(model: ModelFacts, part: Segment) -> None:
    """A decoder makes pictures of latents, an encoder latents of pictures, a factor as large."""
    channels = Dim.parse(model.channels)
    latents = TensorSpec(
        "latents", "float32", (_BATCH, channels, Dim.parse("height"), Dim.parse("width"))
    )
    image = part.outputs[:1] if part.role == "decoder" else part.inputs[:1]
    factor = image[0].dims[-1].coefficient if image and image[0].dims else Fraction(1)
    sides = (Dim(factor, ("height",)), Dim(factor, ("width",)))
    pixels = TensorSpec("image", "float32", (_BATCH, Dim.parse(3), *sides))
    wanted = ((latents,), (pixels,)) if part.role == "decoder" else ((pixels,), (latents,))
    _require(
        (part.inputs, part.outputs) == wanted and factor.denominator == 1,
        f"Part {part.name!r}",
        " to ".join(_shown(side[0]) for side in wanted),
        [_shown(spec) for spec in (*part.inputs, *part.outputs)],
    )


# -- presets ---------------------------------------------------------------------------------------


def check_preset(
    model: ModelFacts, segments: Sequence[Segment], preset: Preset, entry: PresetEntry
) -> None:
    """Raise BundleFormatError unless a preset's tables fit the segments and the manifest.

    Args:
        model: Its blocks and how many computed outputs a reuse combines.
        segments: Those that read the rows.
        preset: As read.
        entry: The preset's line in the manifest.
    """
    where = f"Preset {preset.name!r}"
    _require(preset.schedule.steps == entry.steps, where, f"{entry.steps} steps in its schedule",
             preset.schedule.steps)  # fmt: skip
    _require(preset.schedule.blocks == len(model.blocks), where,
             f"a schedule of {len(model.blocks)} blocks", preset.schedule.blocks)  # fmt: skip
    _require(
        preset.alignment.outputs == model.outputs,
        where,
        f"tables that combine {model.outputs} outputs of a block, as the segments do",
        preset.alignment.outputs,
    )
    computed = blocks_share(segments, preset.schedule)
    right = abs(computed - entry.computed_fraction) < 2e-6  # it is written with six digits
    _require(right, where, f"computed_fraction {entry.computed_fraction}", f"{computed:.6f}")
    _check_rows(model, segments, preset, where)
    _check_solver(preset, where)


def _check_rows(model: ModelFacts, segments: Sequence[Segment], preset: Preset, where: str) -> None:
    """Every row that a segment reads has its table, and every table its row."""
    widths = {
        name: table.shape[2]
        for k, table in enumerate(preset.alignment.tables)
        for name in coefficient_names(k, model.outputs)
    }
    widths |= {name: int(table[0].size) for name, table in preset.time_tables.items()}
    wanted = {  # of one image
        spec.name: int(math.prod(d.coefficient for d in spec.dims))
        for spec in row_specs(model, segments)
    }
    _require(widths.keys() == wanted.keys(), where, f"tables for {sorted(wanted)}", sorted(widths))
    for name, width in wanted.items():
        _require(widths[name] == width, where, f"{width} numbers a step for {name!r}", widths[name])


def _check_solver(preset: Preset, where: str) -> None:
    """The solver can be made, in finite numbers, and knows the timesteps that the model reads.

    Every option is written: a missing one would be taken for its default in silence.
    """
    try:
        with np.errstate(all="ignore"):
            config = recorded_solver(preset.solver)
            timesteps = timesteps_of(config)
    except (ConfigError, TypeError, ValueError, ArithmeticError) as error:
        raise BundleFormatError(f"{where}, solver: {error} Compile again.") from error
    said, meant = (json.loads(json.dumps(options)) for options in (preset.solver, config.to_json()))
    _require(said == meant, f"{where}, solver", f"every option written: {meant}", said)
    if isinstance(config, SolverConfig):
        tables = solver_tables(config)
        numbers = (tables.timesteps, tables.coefficients, tables.input_scale, tables.noising)
        finite = all(bool(np.isfinite(table).all()) for table in numbers)
        _require(finite, f"{where}, solver", "finite coefficients", "NaN or infinity")
    steps = len(timesteps)
    _require(steps == preset.schedule.steps, f"{where}, solver",
             f"{preset.schedule.steps} steps, as the schedule has", steps)  # fmt: skip
    told = preset.time_tables.get("timestep")
    right = told is None or bool((told.ravel() == timesteps).all())
    _require(right, f"{where}, time.timestep", "the solver's timesteps", "others")
