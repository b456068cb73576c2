"""Mutations of a bundle whose hashes and checksum are made again: only contradictions remain.

``mutate(folder, seed)`` changes one thing and says what. Some changes contradict nothing: other
weights, other numbers in a table, another operator in a graph. A bundle that was changed so is a
bundle of another model, and only a signature could tell. These are marked as ``undetectable``.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx

from blockcache.runtime.bundles.manifest import MANIFEST, FileEntry, signed
from blockcache.runtime.bundles.tensor_files import read_tensors, write_tensors

Json: TypeAlias = Any
_Step: TypeAlias = str | int


@dataclass(frozen=True)
class Mutation:
    """What was changed."""

    text: str
    undetectable: bool = False  # it contradicts nothing: another picture is no fault


def mutate(folder: Path, seed: int) -> Mutation:
    """Change one thing in a bundle, then make its hashes and its checksum again.

    Files are replaced, never written to: they may be hard links of another bundle's.
    """
    rng = random.Random(seed)
    kinds, weights = zip(*_KINDS, strict=True)
    return rng.choices(kinds, weights)[0](folder, rng)


def resign(folder: Path) -> None:
    """Write the manifest again, with the hashes that its files have now."""
    content = _manifest(folder)
    content["files"] = {name: asdict(FileEntry.of(folder / name)) for name in content["files"]}
    _write_manifest(folder, content)


def flip_bit(content: bytes, rng: random.Random) -> bytes:
    """The same bytes but for one bit."""
    place = rng.randrange(8 * len(content))
    flipped = bytearray(content)
    flipped[place // 8] ^= 1 << place % 8
    return bytes(flipped)


def _manifest(folder: Path) -> Json:
    return json.loads((folder / MANIFEST).read_text())


def _write_manifest(folder: Path, content: Json) -> None:
    try:
        text = signed(content)
    except (KeyError, ValueError, AttributeError):  # no format, NaN, no object: cannot be signed
        text = json.dumps(content)
    _replace(folder / MANIFEST, text.encode())


def _replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


# -- the manifest's fields -------------------------------------------------------------------------


def _places(value: Json, way: tuple[_Step, ...] = ()) -> Iterator[tuple[_Step, ...]]:
    """Ways to every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in inner:
        yield (*way, key)
        if isinstance(item, dict | list):
            yield from _places(item, (*way, key))


def _at(content: Json, way: tuple[_Step, ...]) -> Json:
    for step in way:
        content = content[step]
    return content


def _shown(way: tuple[_Step, ...]) -> str:
    return ".".join(map(str, way))


def _undetectable(way: tuple[_Step, ...]) -> bool:
    """Fields that nothing else in the bundle repeats, and that decide what is drawn."""
    return way[0] == "presets" and bool({"guidance_scale", "solver"} & set(way))


def _others(value: Json, rng: random.Random) -> list[Json]:
    """Values to put in the place of one: of other types, out of range, slightly off."""
    general: list[Json] = [
        None,
        True,
        -1,
        0,
        1e400,
        math.nan,
        10**9,
        10**30,
        0.5,
        "",
        "x",
        "\x1b[2J",
        [],
        {},
    ]
    if isinstance(value, bool) or value is None:
        return [*general, not value, 3]
    if isinstance(value, int):
        return [*general, value + 1, value - 1, value * 2, float(value), str(value), -value]
    if isinstance(value, float):
        return [*general, value + 1, value / 2, -value, str(value)]
    if isinstance(value, str):
        return [*general, value + "x", value[:-1], value.upper(), [value], "../" + value]
    return [*general, [value], rng.randrange(100)]


def _edit(folder: Path, choose: Callable[[Json], Mutation]) -> Mutation:
    content = _manifest(folder)
    mutation = choose(content)
    _write_manifest(folder, content)
    return mutation


def _change_field(folder: Path, rng: random.Random) -> Mutation:
    def choose(content: Json) -> Mutation:
        way = rng.choice(list(_places(content)))
        parent, last = _at(content, way[:-1]), way[-1]
        other = rng.choice(_others(parent[last], rng))
        text = f"{_shown(way)}: {json.dumps(other)[:40]} for {json.dumps(parent[last])[:40]}"
        parent[last] = other
        return Mutation(text, _undetectable(way))

    return _edit(folder, choose)


def _delete_field(folder: Path, rng: random.Random) -> Mutation:
    def choose(content: Json) -> Mutation:
        way = rng.choice(list(_places(content)))
        del _at(content, way[:-1])[way[-1]]
        return Mutation(f"{_shown(way)} deleted")

    return _edit(folder, choose)


def _add_field(folder: Path, rng: random.Random) -> Mutation:
    def choose(content: Json) -> Mutation:
        objects = [way for way in _places(content) if isinstance(_at(content, way), dict)]
        way = rng.choice(objects)
        _at(content, way)[rng.choice(["extra", "block", "name", "file"])] = rng.choice([1, "x"])
        return Mutation(f"a field added to {_shown(way)}")

    return _edit(folder, choose)


def _swap_entries(folder: Path, rng: random.Random) -> Mutation:
    """Two entries of a list change places, or one stands twice, or one is gone."""

    def choose(content: Json) -> Mutation:
        lists = [w for w in _places(content) if isinstance(_at(content, w), list)]
        way = rng.choice([w for w in lists if len(_at(content, w)) > 1])
        entries = _at(content, way)
        i, j = rng.sample(range(len(entries)), 2)
        if rng.random() < 0.7:
            entries[i], entries[j] = entries[j], entries[i]
            return Mutation(f"{_shown(way)}: {i} and {j} change places", _undetectable(way))
        entries.insert(i, entries[j])
        return Mutation(f"{_shown(way)}: {j} again at {i}", _undetectable(way))

    return _edit(folder, choose)


def _swap_fields(folder: Path, rng: random.Random) -> Mutation:
    """A field of two objects of one kind (two segments, two files) changes places."""

    def choose(content: Json) -> Mutation:
        groups = [
            *[(content["segments"], ("segments",))] * 3,
            (list(content["files"].values()), ("files",)),
            (content["model"]["blocks"], ("model", "blocks")),
            (list(content["presets"].values()), ("presets",)),
        ]
        entries, way = rng.choice(groups)
        first, second = rng.sample(entries, 2)
        key = rng.choice(sorted(first.keys() & second.keys()))
        first[key], second[key] = second[key], first[key]
        return Mutation(f"{_shown(way)}: {key!r} swapped", _undetectable((*way, key)))

    return _edit(folder, choose)


# -- tables ----------------------------------------------------------------------------------------

_TABLES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "doubles": lambda t: t.astype(np.float64),
    "halves": lambda t: t.astype(np.float16),
    "integers": lambda t: t.astype(np.int32),
    "one row less": lambda t: t[:-1],
    "one row more": lambda t: np.concatenate([t, t[-1:]]),
    "one column less": lambda t: t[..., :-1],
    "flat": lambda t: t.ravel(),
    "no rows": lambda t: t[:0],
}


def _change_table(folder: Path, rng: random.Random) -> Mutation:
    path = rng.choice(_files(folder, ".safetensors"))
    tensors = read_tensors(path)
    name = rng.choice(sorted(tensors))
    mutation = rng.choice([_number, _kind, _name])(tensors, name, rng)
    path.unlink()
    write_tensors(path, tensors)
    resign(folder)
    return Mutation(f"{path.name}, {name}: {mutation.text}", mutation.undetectable)


def _number(tensors: dict[str, np.ndarray], name: str, rng: random.Random) -> Mutation:
    """One number of a table. Any but NaN is a number like another, except in the schedule."""
    table = tensors[name] = tensors[name].copy()
    place = tuple(rng.randrange(size) for size in table.shape)
    if name == "recompute":
        table[place] = rng.choice([1 - table[place], 2, 255])
        return Mutation(f"{table[place]} at {place}")
    table[place] = rng.choice([np.nan, np.inf, -np.inf, table[place] + 1, 1e30])
    return Mutation(f"{table[place]} at {place}", bool(np.isfinite(table[place])))


def _kind(tensors: dict[str, np.ndarray], name: str, rng: random.Random) -> Mutation:
    how = rng.choice(sorted(_TABLES))
    tensors[name] = np.ascontiguousarray(_TABLES[how](tensors[name]))
    return Mutation(how)


def _name(tensors: dict[str, np.ndarray], name: str, rng: random.Random) -> Mutation:
    """The table is gone, has another name, or changes places with one of the same shape."""
    table = tensors.pop(name)
    other = rng.choice(["", "extra", "time.extra", *tensors])
    alike = other in tensors and tensors[other].shape == table.shape
    if other in tensors:
        tensors[name] = tensors[other]
    if other:
        tensors[other] = table
    return Mutation(f"now {other!r}" if other else "gone", alike)


# -- files -----------------------------------------------------------------------------------------


def _files(folder: Path, suffix: str = "") -> list[Path]:
    listed = [folder / name for name in _manifest(folder)["files"]]
    return sorted(path for path in listed if path.suffix == suffix or not suffix)


def _change_bytes(folder: Path, rng: random.Random) -> Mutation:
    kinds = sorted({path.suffix for path in _files(folder)})
    path = rng.choice(_files(folder, rng.choice(kinds)))
    content = path.read_bytes()
    how = rng.choice(["a bit flipped", "a bit flipped", "bytes at random", "cut", "longer"])
    place = rng.randrange(len(content))
    if how == "a bit flipped":
        content = flip_bit(content, rng)
    elif how == "bytes at random":
        content = content[:place] + rng.randbytes(16) + content[place + 16 :]
    else:
        content = content[:place] if how == "cut" else content + rng.randbytes(16)
    _replace(path, content)
    resign(folder)
    return Mutation(f"{path.name}: {how}", undetectable=how not in ("cut", "longer"))


def _swap_files(folder: Path, rng: random.Random) -> Mutation:
    suffix = rng.choice([".onnx", ".onnx", ".safetensors"])
    first, second = rng.sample(_files(folder, suffix), 2)
    one, other = first.read_bytes(), second.read_bytes()
    _replace(first, other)
    _replace(second, one)
    resign(folder)
    return Mutation(f"{first.name} and {second.name} change places")


def _replace_file(folder: Path, rng: random.Random) -> Mutation:
    """Something else stands where a file was; the manifest keeps its promise."""
    path = rng.choice([*_files(folder), folder / MANIFEST])
    how = rng.choice(["a folder", "a link to itself", "a link outside", "a pipe", "nothing"])
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how == "a link to itself":
        path.symlink_to(path.name)
    elif how == "a link outside":
        path.symlink_to("/dev/zero")
    elif how == "a pipe":
        os.mkfifo(path)
    return Mutation(f"{how} for {path.name}")


# -- graphs ----------------------------------------------------------------------------------------


def _change_graph(folder: Path, rng: random.Random) -> Mutation:
    path = rng.choice(_files(folder, ".onnx"))
    model = onnx.load(path, load_external_data=False)
    mutation = rng.choice([_boundary, _boundary, _weight, _node])(model.graph, rng)
    _replace(path, model.SerializeToString())
    resign(folder)
    return Mutation(f"{path.name}: {mutation.text}", mutation.undetectable)


def _boundary(graph: onnx.GraphProto, rng: random.Random) -> Mutation:
    """What a graph says of its inputs and outputs."""
    side = rng.choice([graph.input, graph.output])
    value = rng.choice(list(side))
    tensor = value.type.tensor_type
    how = rng.choice(["name", "dtype", "dimension", "rank", "gone", "twice"])
    if how == "name":
        value.name += "x"
    elif how == "dtype":
        tensor.elem_type = rng.choice([t for t in (1, 7, 10, 11, 16) if t != tensor.elem_type])
    elif how == "dimension":
        rng.choice(list(tensor.shape.dim)).dim_value = rng.choice([3, 10**9])
    elif how == "rank":
        tensor.shape.dim.add().dim_value = 1
    elif how == "twice":
        side.add().CopyFrom(value)
    else:
        side.remove(value)
    return Mutation(f"{value.name}, {how}")


def _weight(graph: onnx.GraphProto, rng: random.Random) -> Mutation:
    """Where a graph finds a weight."""
    weight = rng.choice([w for w in graph.initializer if w.data_location == 1])
    entry = rng.choice(list(weight.external_data))
    others = {
        "location": ["/etc/passwd", "../weights.bin", "other.bin", "", "manifest.json"],
        "offset": ["-4096", str(10**15), "x", "0"],
        "length": ["0", str(10**15), "x", "4"],
    }
    entry.value = rng.choice(others[entry.key])
    undetectable = (entry.key, entry.value) == ("offset", "0")  # inside the file: other weights
    return Mutation(f"{weight.name}, {entry.key}: {entry.value!r}", undetectable)


def _node(graph: onnx.GraphProto, rng: random.Random) -> Mutation:
    """An operator: another one, another domain, other attributes, or none."""
    node = rng.choice(list(graph.node))
    how = rng.choice(["operator", "domain", "input", "gone"])
    if how == "operator":
        node.op_type = rng.choice(["Mul", "Identity", "Nonsense"])
    elif how == "domain":
        node.domain = "com.microsoft"
    elif how == "input":
        node.input[0] = rng.choice(["", "nothing", node.input[-1]])
    else:
        graph.node.remove(node)
    return Mutation(f"{node.name}, {how}", undetectable=how != "domain")


_KINDS: list[tuple[Callable[[Path, random.Random], Mutation], int]] = [
    (_change_field, 30),
    (_delete_field, 8),
    (_add_field, 4),
    (_swap_entries, 12),
    (_swap_fields, 10),
    (_change_table, 14),
    (_change_bytes, 8),
    (_swap_files, 4),
    (_replace_file, 4),
    (_change_graph, 16),
]
