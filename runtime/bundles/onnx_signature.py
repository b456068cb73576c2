"""What an ONNX file says of itself: its inputs, its outputs, the places of its weights.

The runtime does without the onnx package, so this reads the protobuf wire format, and of it only
what is compared with the manifest. Field numbers are those of onnx.proto. What blockcache never
writes and an engine library would follow (subgraphs, functions, operators of other domains, which
may name further files) is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from blockcache.runtime.errors import BundleFormatError, ConfigError
from blockcache.runtime.plan import Dim, TensorSpec

# TensorProto.DataType
_DTYPES = {1: "float32", 7: "int64", 10: "float16", 16: "bfloat16"}
_ELEMENT_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}

_MODEL_FIELDS = {
    1: "ir_version", 2: "producer_name", 3: "producer_version", 4: "domain", 5: "model_version",
    6: "doc_string", 7: "graph", 8: "opset_import", 14: "metadata_props",
}  # fmt: skip
_GRAPH_FIELDS = {
    1: "node", 2: "name", 5: "initializer", 10: "doc_string", 11: "input", 12: "output",
    13: "value_info", 14: "quantization_annotation", 16: "metadata_props",
}  # fmt: skip
_TYPES = (1, 4, 5, 7, 8, 9)  # TypeProto: tensor, sequence, map, opaque, sparse tensor, optional
_SUBGRAPHS = {6: "a graph", 11: "graphs", 22: "a sparse tensor", 23: "sparse tensors"}

_Value: TypeAlias = int | bytes
_Fields: TypeAlias = Iterator[tuple[int, _Value]]


@dataclass(frozen=True)
class WeightsRange:
    """Where the file keeps the content of one weight: a range of a file beside it."""

    name: str
    file: str
    offset: int  # bytes
    length: int  # bytes


@dataclass(frozen=True)
class OnnxSignature:
    """A graph seen from outside."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[WeightsRange, ...]  # of every tensor whose content lies in another file


class _WireError(Exception):
    """Bytes that are no protobuf message, or one with a content that is refused."""


def read_signature(content: bytes, name: str) -> OnnxSignature:
    """Read the signature of an ONNX file.

    Args:
        content: The file's bytes.
        name: Of the file, for the error.

    Raises:
        BundleFormatError: the bytes are no ONNX model, or hold what blockcache never writes.
    """
    try:
        return _model(content)
    except (_WireError, ConfigError) as error:
        raise BundleFormatError(
            f"Expected an ONNX model of blockcache in {name}, got one with {error}. Compile again."
        ) from error


# -- messages --------------------------------------------------------------------------------------


def _model(content: bytes) -> OnnxSignature:
    graphs = []
    for number, value in _fields(content):
        if number not in _MODEL_FIELDS:
            raise _WireError(f"the unknown part {number} of a model (a function, or training)")
        if number == 7:
            graphs.append(_message(value))
    if len(graphs) != 1:
        raise _WireError(f"{len(graphs)} graphs, not one")
    return _graph(graphs[0])


def _graph(content: bytes) -> OnnxSignature:
    inputs: list[TensorSpec] = []
    outputs: list[TensorSpec] = []
    weights: list[WeightsRange] = []
    for number, value in _fields(content):
        if number not in _GRAPH_FIELDS:
            raise _WireError(f"the unknown part {number} of a graph (sparse weights)")
        if number == 1:
            weights.extend(_node_weights(_message(value)))
        elif number == 5:
            weights.extend(_weights(_message(value)))
        elif number == 11:
            inputs.append(_tensor_spec(_message(value)))
        elif number == 12:
            outputs.append(_tensor_spec(_message(value)))
    return OnnxSignature(tuple(inputs), tuple(outputs), tuple(weights))


def _node_weights(content: bytes) -> Iterator[WeightsRange]:
    """NodeProto: what its attributes keep in other files; refuses what may hold code or graphs."""
    for number, value in _fields(content):
        if number == 7 and _text(value) not in ("", "ai.onnx"):
            raise _WireError(f"an operator of the domain {_text(value)!r}")
        if number != 5:
            continue
        for inner, part in _fields(_message(value)):  # AttributeProto
            if inner in _SUBGRAPHS:
                raise _WireError(f"{_SUBGRAPHS[inner]} in an attribute")
            if inner in (5, 10):
                yield from _weights(_message(part))


def _weights(content: bytes) -> Iterator[WeightsRange]:
    """TensorProto: its range of another file, if its content lies there."""
    dims: list[int] = []
    name, dtype, external, entries = "", 0, False, {}
    for number, value in _fields(content):
        if number == 1:
            dims.extend(_packed(value))
        elif number == 2:
            dtype = _number(value)
        elif number == 8:
            name = _text(value)
        elif number == 13:
            key, text = _entry(_message(value))
            if key in entries:
                raise _WireError(f"two values for {key!r} of the weight {name!r}")
            entries[key] = text
        elif number == 14:
            external = _number(value) == 1
    if not external:
        if entries:
            raise _WireError(f"a place for the weight {name!r}, which is said to be in the file")
        return
    offset, length = _decimal(entries, "offset", name), _decimal(entries, "length", name)
    wanted = math.prod(dims) * _ELEMENT_BYTES.get(dtype, 0)
    if length != wanted:
        raise _WireError(f"{length} bytes for the weight {name!r}, whose shape needs {wanted}")
    yield WeightsRange(name, entries.get("location", ""), offset, length)


def _entry(content: bytes) -> tuple[str, str]:
    """StringStringEntryProto."""
    found = {number: _text(value) for number, value in _fields(content)}
    return found.get(1, ""), found.get(2, "")


def _decimal(entries: dict[str, str], key: str, name: str) -> int:
    text = entries.get(key, "")
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise _WireError(f"the {key} {text[:20]!r} of the weight {name!r}")
    return int(text)


def _tensor_spec(content: bytes) -> TensorSpec:
    """ValueInfoProto, its type a tensor of known rank."""
    found = _once(content, (1, 2))
    name = _text(found.get(1, b""))
    kind = _once(_part(found, 2, name), _TYPES)
    if set(kind) != {1}:
        raise _WireError(f"a boundary tensor {name!r} that is no tensor")
    tensor = _once(_part(kind, 1, name), (1, 2))
    element = _number(tensor.get(1, 0))
    if element not in _DTYPES:
        raise _WireError(f"a boundary tensor {name!r} of the element type {element}")
    dims = [_dim(_message(v), name) for n, v in _fields(_part(tensor, 2, name)) if n == 1]
    return TensorSpec(name, _DTYPES[element], tuple(dims))


def _dim(content: bytes, name: str) -> Dim:
    """TensorShapeProto.Dimension: a number, or a text such as "height/2"."""
    found = _once(content, (1, 2))
    if set(found) == {1}:
        return Dim.parse(_number(found[1]))
    if set(found) == {2}:
        return Dim.parse(_text(found[2]))
    raise _WireError(f"a boundary tensor {name!r} of unknown shape")


# -- values ----------------------------------------------------------------------------------------


def _once(content: bytes, numbers: Container[int]) -> dict[int, _Value]:
    """The fields of these numbers. None may stand twice: readers differ in which one counts."""
    found: dict[int, _Value] = {}
    for number, value in _fields(content):
        if number in found:
            raise _WireError(f"part {number} of a message twice")
        if number in numbers:
            found[number] = value
    return found


def _part(found: dict[int, _Value], number: int, name: str) -> bytes:
    if number not in found:
        raise _WireError(f"a boundary tensor {name!r} without dtype and shape")
    return _message(found[number])


def _message(value: _Value) -> bytes:
    if isinstance(value, int):
        raise _WireError("a number where a message belongs")
    return value


def _number(value: _Value) -> int:
    if not isinstance(value, int):
        raise _WireError("bytes where a number belongs")
    return value


def _text(value: _Value) -> str:
    try:
        return _message(value).decode()
    except UnicodeDecodeError as error:
        raise _WireError("a name that is not UTF-8") from error


def _packed(value: _Value) -> Iterator[int]:
    """A repeated number: one a field, or all in one."""
    if isinstance(value, int):
        yield value
        return
    at = 0
    while at < len(value):
        number, at = _varint(value, at)
        yield number


# -- the wire --------------------------------------------------------------------------------------


def _fields(content: bytes) -> _Fields:
    """Number and value of every field: an int, or the bytes of a text or message."""
    at = 0
    while at < len(content):
        tag, at = _varint(content, at)
        read = _READERS.get(tag & 7)
        if read is None or not tag >> 3:
            raise _WireError("bytes that are no protobuf message")
        value, at = read(content, at)
        yield tag >> 3, value


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """An unsigned number of at most 64 bits, and the place behind it."""
    if at < len(content) and content[at] < 0x80:  # most have one byte
        return content[at], at + 1
    number = shift = 0
    while at < len(content) and shift < 64:
        byte = content[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number & 0xFFFF_FFFF_FFFF_FFFF, at
    raise _WireError("a number that does not end")


def _delimited(content: bytes, at: int) -> tuple[bytes, int]:
    length, at = _varint(content, at)
    return _slice(content, at, length)


def _slice(content: bytes, at: int, length: int) -> tuple[bytes, int]:
    if length > len(content) - at:
        raise _WireError("an end before its content: the file is truncated")
    return content[at : at + length], at + length


_READERS: dict[int, Callable[[bytes, int], tuple[_Value, int]]] = {
    0: _varint,
    1: lambda content, at: _slice(content, at, 8),
    2: _delimited,
    5: lambda content, at: _slice(content, at, 4),
}
