"""Time tables: the hoisted time projections of a preset, evaluated for all its steps at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from blockcache.runtime.engines.onnxruntime_library import ort
from blockcache.runtime.errors import MissingExtraError
from blockcache.runtime.plan import LOOP_ROLES, Segment

_HALF = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)
_FLOAT = ir.TensorType(ir.DataType.FLOAT)


def time_tables(
    segments: tuple[Segment, ...], folder: Path, timesteps: np.ndarray
) -> dict[str, np.ndarray]:
    """Rows of every hoisted tensor, and of the timestep where the loop reads it: float32 [S, ...].

    The segment is evaluated in float32 whatever the model's precision: it is small, it runs once,
    and rounding the sinusoids of the timestep would cost more than rounding the result.

    Args:
        segments: of the bundle; the one of role ``time`` is evaluated.
        folder: where the segments' files lie.
        timesteps: float32 [S].
    """
    found = [segment for segment in segments if segment.role == "time"]
    loop = [segment for segment in segments if segment.role in LOOP_ROLES]
    reads = any(spec.name == "timestep" for segment in loop for spec in segment.inputs)
    plain = {"timestep": timesteps.astype(np.float32)[:, None]} if reads else {}
    if not found:  # not hoisted
        return plain
    if ort is None:
        raise MissingExtraError.of("onnxruntime", "cpu", "Evaluating time tables")
    path = folder / found[0].file
    model = ir.load(path)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # small work: idle threads would only spin
    options.enable_cpu_mem_arena = False
    # The weights stay on disk: copies of SD1.5's, widened, would be a quarter of the whole U-Net.
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent)
    )
    if _to_float32(model.graph):
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [spec.name for spec in found[0].outputs]
    rows = session.run(names, {"timestep": timesteps.astype(np.float32)})
    return {**dict(zip(names, rows, strict=True)), **plain}


def _to_float32(graph: ir.Graph) -> bool:
    """Type a half-precision graph as float32, in place: each weight is widened where it is read.

    Returns:
        Whether there was any weight to widen.
    """
    for node in graph:
        if node.op_type == "Cast" and ir.DataType(node.attributes["to"].as_int()) in _HALF:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT.value)
        for value in node.outputs:
            if value.dtype in _HALF:
                value.type = ir.TensorType(ir.DataType.FLOAT)
    for value in graph.inputs:
        if value.dtype in _HALF:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    halves = [
        v
        for v in graph.initializers.values()
        if v.const_value is not None and v.const_value.dtype in _HALF
    ]
    first = graph[0]
    for value in halves:
        cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT.value})
        wide = cast.outputs[0]
        wide.name, wide.type, wide.shape = f"{value.name}_wide", _FLOAT, value.shape
        for user, index in tuple(value.uses()):
            if user is not cast:
                user.replace_input_with(index, wide)
        graph.insert_before(first, cast)
    return bool(halves)
