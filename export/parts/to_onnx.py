"""A part as one ONNX file with its weights beside it.

Parts are not cut, so they are traced with dynamic axes, where the U-Net is traced with prime-coded
sizes and made general afterwards.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from blockcache.export.graph.passes.canonical import canonical
from blockcache.export.graph.to_onnx import OPSET, let_go, quiet
from blockcache.export.parts.part import Part
from blockcache.export.unet.model import TORCH_DTYPES
from blockcache.runtime.errors import ExportError
from blockcache.runtime.plan import Dim, Segment, Sizes, TensorSpec

_TRACED = Sizes(batch=2, height=16, width=24, tokens=77)


def export_part(part: Part, folder: Path, precision: str, sizes: Sizes) -> Segment:
    """Write ``folder/NAME.onnx`` and ``folder/NAME.bin``; the segment's file is inside the folder.

    Args:
        part: what to load and trace.
        folder: is there already.
        precision: of weights and activations; a part that overflows in float16 keeps float32.
        sizes: at which its FLOPs are counted.

    Raises:
        ConfigError: weights that are not whole.
        ExportError: torch cannot trace it.
    """
    precision = "float32" if part.single and precision == "float16" else precision
    module = part.load(TORCH_DTYPES[precision]).eval().requires_grad_(False)
    inputs = tuple(_spec(name, part.inputs[name]) for name in part.inputs)
    flops = _flops(module, inputs, sizes)
    program = _trace(part, module, inputs)
    graph = program.graph
    for value, dims in zip(graph.outputs, part.outputs.values(), strict=True):
        _describe(value, dims)
    for value, dims in zip(graph.inputs, part.inputs.values(), strict=True):
        _describe(value, dims)
    canonical(graph)
    graph.name = part.name
    path = folder / f"{part.name}.onnx"
    ir.save(ir.Model(graph, ir_version=program.ir_version), path, external_data=f"{part.name}.bin")
    let_go(program, module)
    outputs = tuple(_spec(v.name or "", part.outputs[v.name or ""], v.dtype) for v in graph.outputs)
    return Segment(part.name, part.role, path.name, inputs, outputs, None, flops)


def _flops(module: torch.nn.Module, inputs: tuple[TensorSpec, ...], sizes: Sizes) -> int:
    """Multiply-adds counted as two, of a run without numbers."""
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        module(*_example(inputs, sizes))
    return int(counter.get_total_flops())


def _example(inputs: tuple[TensorSpec, ...], sizes: Sizes) -> tuple[torch.Tensor, ...]:
    """Inputs whose values do not matter."""
    return tuple(torch.ones(spec.shape(sizes), dtype=getattr(torch, spec.dtype)) for spec in inputs)


def _trace(part: Part, module: torch.nn.Module, inputs: tuple[TensorSpec, ...]) -> ir.Model:
    """``torch.onnx.export`` with an axis of its own for everything that a request chooses."""
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                _example(inputs, _TRACED),
                input_names=[spec.name for spec in inputs],
                output_names=list(part.outputs),
                dynamic_shapes=tuple(_axes(spec) for spec in inputs),
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as error:  # torch's exporter raises classes of many libraries
        raise ExportError(
            f"torch {torch.__version__} cannot trace {part.name} ({type(error).__name__}: "
            f"{str(error)[:500]}). Compile without it: --parts unet."
        ) from error
    assert program is not None
    return program.model


def _axes(spec: TensorSpec) -> dict[int, object]:
    """The dynamic axes of an input, as ``torch.export`` names them."""
    found: dict[int, object] = {}
    for place, dim in enumerate(spec.dims):
        if dim.axes:
            # diffusers' upsampling asks whether the batch is 64 or more, and does the same then.
            most = {"max": 63} if dim.axes[0] == "batch" else {}
            axis = torch.export.Dim(dim.axes[0], **most)
            found[place] = int(dim.coefficient) * axis if dim.coefficient != 1 else axis
    return found


def _spec(name: str, dims: tuple[str | int, ...], dtype: ir.DataType | None = None) -> TensorSpec:
    """A boundary tensor as the manifest describes it; token numbers are int64, pictures float32."""
    if dtype is None:
        kind = "int64" if name in ("input_ids", "attention_mask") else "float32"
    else:
        kind = {ir.DataType.FLOAT: "float32"}.get(dtype, dtype.name.lower())
    return TensorSpec(name, kind, tuple(Dim.parse(dim) for dim in dims))


def _describe(value: ir.Value, dims: tuple[str | int, ...]) -> None:
    """Write a shape as the manifest does."""
    parsed = [Dim.parse(dim) for dim in dims]
    value.shape = ir.Shape([str(dim) if dim.axes else int(dim.coefficient) for dim in parsed])
