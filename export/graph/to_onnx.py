"""Export: torch U-Net to ONNX segments that share one weights file.

``export_segments`` runs ``torch.onnx.export`` once on the whole U-Net with prime-coded static
shapes, then the passes align, hoist, split and symbolic. Weights are written once; everything
after the export handles them as offsets into that file.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from blockcache.export.graph.passes.align import align, align_cuts
from blockcache.export.graph.passes.canonical import canonical
from blockcache.export.graph.passes.hoist import classify
from blockcache.export.graph.passes.simplify import simplify
from blockcache.export.graph.passes.split import Piece, split
from blockcache.export.graph.passes.symbolic import SizeCode, generalize
from blockcache.export.graph.passes.unify import unify
from blockcache.export.graph.work import graph_flops
from blockcache.export.observer import Observer, unobserved
from blockcache.export.unet.model import BRANCH, TORCH_DTYPES, SourceModel
from blockcache.export.unet.precision import converted
from blockcache.runtime.bundles.manifest import PRECISIONS, WEIGHTS_FILE
from blockcache.runtime.errors import ConfigError, ExportError
from blockcache.runtime.plan import DTYPE_BYTES, Dim, Segment, Sizes, TensorSpec

OPSET = 22
"""Opset 20 has no bf16 normalisation; 23 emits Attention, which engines build worse."""

EXPORT_PARTS = ("trace", "weights", "cut", "hash")
"""What an export does, in order. ``export_segments`` does all but the last: its caller hashes what
it has written."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How the U-Net is cut and typed."""

    precision: str = "float32"  # of weights and activations: float32, bfloat16 or float16
    outputs: int = 1  # computed outputs that a reuse may combine: 1, or 2 for history
    hoist: bool = True  # move what does not depend on the sample out of the loop
    cuts: tuple[int, ...] = ()  # depths of the branches that may be reused, see ``Block.depth``

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"Expected a precision of {PRECISIONS}, got {self.precision!r}.")
        if self.outputs not in (1, 2):
            raise ConfigError(f"A reuse combines 1 or 2 computed outputs; got {self.outputs}.")


def export_segments(
    model: SourceModel,
    folder: Path,
    options: ExportOptions,
    observer: Observer = unobserved,
) -> tuple[Segment, ...]:
    """Write ``folder/*.onnx`` and ``folder/weights.bin``; returns the segments in running order.

    The last one, role ``whole``, is the uncut model: the yardstick for exactness and speed. The
    model stays as it is: where ``options.precision`` is another than its own, a copy is exported.
    ``observer`` hears how many of ``EXPORT_PARTS`` are done, stage "export".
    """
    folder.mkdir(parents=True, exist_ok=True)
    given = model.call()
    model = converted(model.cut_at(options.cuts), options.precision)
    code = _code_for(model)
    traced = folder / "traced.onnx"
    observer("export", EXPORT_PARTS.index("trace"), len(EXPORT_PARTS))
    program = _trace(model, code)
    observer("export", EXPORT_PARTS.index("weights"), len(EXPORT_PARTS))
    ir.save(program, traced, external_data=WEIGHTS_FILE)
    let_go(program, model.call(), kept=given)
    del program
    observer("export", EXPORT_PARTS.index("cut"), len(EXPORT_PARTS))
    try:
        return _cut(model, traced, code, options)
    finally:
        traced.unlink()


def _code_for(model: SourceModel) -> SizeCode:
    sizes = {size for tensor in model.call().parameters() for size in tensor.shape}
    sizes |= {dim.coefficient.numerator for c in model.conditions for dim in c.dims}
    pooled = model.unet.config.addition_embed_type == "text"  # with a token for the whole prompt
    return SizeCode.avoiding(sizes, model.downsampling, one_more=pooled)


def _example(model: SourceModel, code: SizeCode) -> tuple[torch.Tensor, ...]:
    """Inputs of the prime-coded shapes; their values do not matter."""
    dtype = next(model.unet.parameters()).dtype
    dtypes = {"model": dtype, "int64": torch.int64, **TORCH_DTYPES}
    sizes = Sizes(
        batch=code.batch,
        height=code.height * code.downsampling,
        width=code.width * code.downsampling,
        tokens=code.tokens,
    )
    shape = (sizes.batch, model.channels, sizes.height, sizes.width)
    sample = torch.zeros(shape, dtype=dtype)
    conditions = [
        torch.zeros(condition.sized(sizes), dtype=dtypes[condition.dtype])
        for condition in model.conditions
    ]
    return (sample, torch.zeros(code.batch), *conditions)


def _trace(model: SourceModel, code: SizeCode) -> ir.Model:
    """``torch.onnx.export`` of the whole U-Net; its weights are the module's own."""
    names = [condition.name for condition in model.conditions]
    with quiet():
        program = torch.onnx.export(
            model.call(),
            _example(model, code),
            input_names=["sample", "timestep", *names],
            output_names=["model_output"],
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    return program.model


def let_go(program: ir.Model, module: torch.nn.Module, kept: torch.nn.Module | None = None) -> None:
    """Free the weights of a graph that is saved, and of the module that it was traced from.

    To drop both is not enough: the rules of onnxscript's rewriter live as long as the process, and
    the last graph that they saw lives with them.

    Args:
        program: not to be used afterwards.
        module: the same.
        kept: a module that shares weights with it, which stay.
    """
    for value in program.graph.initializers.values():
        value.const_value = None
    shared = set() if kept is None else {id(tensor) for tensor in _tensors(kept)}
    for tensor in _tensors(module):
        if id(tensor) not in shared:
            tensor.data = tensor.new_empty(0)


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporter's prints and warnings are about its own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _load(path: Path) -> ir.Model:
    """The traced model, simplified, its weights left on disk."""
    model = ir.load(path)
    simplify(model.graph)
    unify(model.graph)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                WEIGHTS_FILE,
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=tensor.shape,
                name=tensor.name,
                base_dir=path.parent,
            )
    return model


def _cut(
    model: SourceModel, traced: Path, code: SizeCode, options: ExportOptions
) -> tuple[Segment, ...]:
    """The passes, in order, and the files they end in."""
    sizes = model.sizes()
    conditions = [condition.name for condition in model.conditions]
    loaded = _load(traced)
    graph = loaded.graph
    paths = [block.path for block in model.blocks if block.kind != BRANCH]
    blocks = align(graph, paths, options.outputs)
    cuts = align_cuts(graph, model.cuts, len(paths), options.outputs)
    hoistable = classify(graph, conditions)
    if not options.hoist:
        hoistable = dict.fromkeys(hoistable, "loop")
    segments = [
        _write(piece, traced.parent, code, loaded.ir_version, sizes)
        for piece in split(graph, blocks, hoistable, cuts)
    ]
    uncut = _load(traced).graph
    whole = Piece("whole", "whole", None, uncut)
    return (*segments, _write(whole, traced.parent, code, loaded.ir_version, sizes))


def _write(piece: Piece, folder: Path, code: SizeCode, ir_version: int, sizes: Sizes) -> Segment:
    """Generalise a piece, save it beside the weights, and describe it."""
    graph = piece.graph
    flops = graph_flops(graph, code).at(sizes)
    generalize(graph, code)
    canonical(graph)
    graph.name = piece.name
    path = folder / f"{piece.name}.onnx"
    ir.save(ir.Model(graph, ir_version=ir_version), path)
    inputs = tuple(_spec(value) for value in graph.inputs)
    outputs = tuple(_spec(value) for value in graph.outputs)
    return Segment(piece.name, piece.role, path.name, inputs, outputs, piece.block, flops)


def _spec(value: ir.Value) -> TensorSpec:
    """A boundary tensor as the manifest describes it."""
    if value.name is None or value.shape is None or value.dtype is None:
        raise ExportError(f"A boundary tensor lacks name, shape or dtype: {value}.")
    dtype = {ir.DataType.FLOAT: "float32"}.get(value.dtype, value.dtype.name.lower())
    if dtype not in DTYPE_BYTES:
        raise ExportError(
            f"Boundary tensor {value.name!r} has dtype {dtype}; expected {sorted(DTYPE_BYTES)}."
        )
    dims = (
        Dim.parse(size.value or "" if isinstance(size, ir.SymbolicDim) else size)
        for size in value.shape
    )
    return TensorSpec(value.name, dtype, tuple(dims))
