"""The layers of a built engine, read from the build log or, with a device, from the inspector.

Without a GPU an engine cannot be opened, but with detailed profiling verbosity the builder ends its
log with the very list that the inspector would give.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from blockcache.runtime.engines.tensorrt_library import TensorRT

_LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), Inputs: (?P<rest>.*)$")
_TENSOR = re.compile(r"\{ Name: (.*?), Dimensions: .*?, Datatype: (\w+)")
_SCRATCH = re.compile(r"Total Activation Memory: (\d+)")
_HOST_KINDS = {"shape_call", "reshape", "signal", "wait"}  # computed on the host or not at all


@dataclass(frozen=True)
class Layer:
    """One entry of an engine's layer list."""

    name: str
    kind: str  # the library's word: kgen, gemm, correlation, ...
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    host: bool = False  # shape arithmetic on the host: launches nothing


def logged_layers(messages: Iterable[str]) -> list[Layer]:
    """Layers from the messages of a build."""
    found = []
    for message in messages:
        for line in message.splitlines():
            match = _LAYER.match(line)
            if match:
                found.append(_layer(match["name"], match["kind"], match["rest"]))
    return found


def _layer(name: str, kind: str, rest: str) -> Layer:
    inputs, _, behind = rest.partition("], Constants: [")
    _, _, outputs = behind.partition("], Outputs: [")
    read, written = _TENSOR.findall(inputs), _TENSOR.findall(outputs)
    # Casts of lone int64 numbers are dimensions, worked out on the host.
    scalar = kind == "cast" and all(dtype in ("Int64", "Int32") for _, dtype in (*read, *written))
    return Layer(
        name,
        kind,
        tuple(tensor for tensor, _ in read),
        tuple(tensor for tensor, _ in written),
        host=kind in _HOST_KINDS or scalar,
    )


def logged_scratch(messages: Sequence[str]) -> int:
    """Bytes of activation memory at the largest profile, as the builder logged them."""
    return max((int(m[1]) for text in messages if (m := _SCRATCH.search(text))), default=0)


def inspected_layers(library: TensorRT, plan: Any) -> list[Layer]:
    """Layers by the inspector: opens the engine, so there must be a device that can run it."""
    runtime = library.module.Runtime(library.logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return []
    text = engine.create_engine_inspector().get_engine_information(
        library.module.LayerInformationFormat.JSON
    )
    return parse_inspector(text)


def parse_inspector(text: str) -> list[Layer]:
    """Layers from the inspector's JSON."""
    found = []
    for entry in json.loads(text).get("Layers", []):
        if isinstance(entry, str):  # an engine without detailed verbosity lists names only
            found.append(Layer(entry, "", (), ()))
            continue
        inputs, outputs = (
            tuple(str(tensor.get("Name", "")) for tensor in entry.get(side, []))
            for side in ("Inputs", "Outputs")
        )
        kind = str(entry.get("LayerType", ""))
        found.append(Layer(str(entry.get("Name", "")), kind, inputs, outputs, kind in _HOST_KINDS))
    return found
