"""Time tables: the hoisted time projections of a preset, evaluated for all its steps at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from blockcache.runtime.engines.onnxruntime_library import ort
from blockcache.runtime.errors import MissingExtraError
from blockcache.runtime.plan import Segment

_HALF = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)


def time_tables(
    segments: tuple[Segment, ...], folder: Path, timesteps: np.ndarray
) -> dict[str, np.ndarray]:
    """Rows of every hoisted tensor: name to float32 [S, ...].

    The segment is evaluated in float32 whatever the model's precision: it is small, it runs once,
    and rounding the sinusoids of the timestep would cost more than rounding the result.

    Args:
        segments: of the bundle; the one of role ``time`` is evaluated.
        folder: where the segments' files lie.
        timesteps: float32 [S].
    """
    found = [segment for segment in segments if segment.role == "time"]
    if not found:  # not hoisted: the loop reads the timestep itself
        return {"timestep": timesteps.astype(np.float32)[:, None]}
    if ort is None:
        raise MissingExtraError.of("onnxruntime", "cpu", "Evaluating time tables")
    model = ir.load(folder / found[0].file)
    _to_float32(model.graph)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # small work: idle threads would only spin
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [spec.name for spec in found[0].outputs]
    rows = session.run(names, {"timestep": timesteps.astype(np.float32)})
    return dict(zip(names, rows, strict=True))


def _to_float32(graph: ir.Graph) -> None:
    """Type a half-precision graph as float32, in place, its weights in memory."""
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            continue
        half = tensor.dtype in _HALF
        content = tensor.numpy().astype(np.float32) if half else tensor.numpy().copy()
        value.const_value = ir.tensor(content, name=value.name)
        if half:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in graph:
        if node.op_type == "Cast" and ir.DataType(node.attributes["to"].as_int()) in _HALF:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT.value)
        for value in node.outputs:
            if value.dtype in _HALF:
                value.type = ir.TensorType(ir.DataType.FLOAT)
    for value in graph.inputs:
        if value.dtype in _HALF:
            value.type = ir.TensorType(ir.DataType.FLOAT)
