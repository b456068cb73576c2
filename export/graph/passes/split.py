"""Pass: one graph becomes segments, cut at every block, and around every branch.

The K blocks of a U-Net lie on one chain: trunk 0, block 0, trunk 1, block 1, ..., trunk K. Every
node of the loop goes to the latest of these stages that its consumers allow, so that few tensors
cross; the output of block k is pinned to its block, and the aligned sum that consumes it to the
trunk behind. What the hoist pass took out of the loop becomes the segments ``time``, ``prompt``
and ``condition``.

Where the graph has cuts, a trunk is cut further. The *depth* of a node is the number of cuts whose
reuse makes it superfluous: a node of depth 0 runs at every step, one of depth 2 only where neither
of the two shallowest cuts is reused. A segment holds nodes of one depth and of one side, before the
branch or behind it.

A value that is used outside its own segment becomes a boundary tensor with a plain name:
``trunk_3_1`` is the second tensor that trunk 3 hands on, ``prompt_0`` the first that the prompt
segment makes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir

from blockcache.export.graph.passes.align import AlignedBlock, AlignedCut
from blockcache.export.graph.passes.hoist import BOUNDARY_PREFIX, HOISTED, Class
from blockcache.runtime.errors import ExportError
from blockcache.runtime.plan import Role


@dataclass(frozen=True)
class Piece:
    """A segment before it is written: its place, its role, and a graph of its own."""

    name: str
    role: Role
    block: int | None
    graph: ir.Graph


@dataclass(frozen=True, order=True)
class Place:
    """Where in the loop a node runs; places are ordered as they run."""

    chain: int  # 2k: trunk k; 2k + 1: block k
    level: int  # rises from the sample down to the deepest branch, and up again to the output


Stage: TypeAlias = Place | Class
"""A place in the loop, or a class of ``hoist.HOISTED``."""


def split(
    graph: ir.Graph,
    blocks: Sequence[AlignedBlock],
    classes: Mapping[ir.Node, Class],
    cuts: Sequence[AlignedCut] = (),
) -> list[Piece]:
    """Cut ``graph`` at its blocks and branches.

    Args:
        graph: of the whole U-Net.
        blocks: as ``align`` returned them.
        classes: as ``classify`` returned them.
        cuts: as ``align_cuts`` returned them, the shallowest first.

    Returns:
        The pieces in the order in which they run: hoisted ones first, then the loop.
    """
    stages = _assign_stages(graph, blocks, classes, cuts)
    loop = sorted({stage for stage in stages.values() if isinstance(stage, Place)})
    trunks = [place for place in loop if not place.chain % 2]
    numbers = {place: place.chain // 2 for place in loop}
    numbers |= {place: index for index, place in enumerate(trunks)}
    kept = {block.branch for block in blocks} | {cut.output for cut in cuts}
    crossing = _crossing_values(graph, stages)
    _name_boundaries([value for value in crossing if value not in kept], stages, numbers)
    pieces = []
    for stage in (*HOISTED, *loop):
        outputs = [value for value in crossing if stages[_producer(value)] == stage]
        outputs += [value for value in graph.outputs if stages[_producer(value)] == stage]
        if outputs:
            piece = ir.convenience.extract(graph, _inputs(graph, stage, stages), outputs)
            piece.name = _stage_name(stage, numbers)
            pieces.append(Piece(piece.name, _role(stage), _block(stage), piece))
    return pieces


def _stage_name(stage: Stage, numbers: Mapping[Place, int]) -> str:
    return stage if isinstance(stage, str) else f"{_role(stage)}_{numbers[stage]:02d}"


def _role(stage: Stage) -> Role:
    if isinstance(stage, Place):
        return "block" if stage.chain % 2 else "trunk"
    roles: dict[str, Role] = {"time": "time", "prompt": "prompt", "condition": "condition"}
    return roles[stage]


def _block(stage: Stage) -> int | None:
    return stage.chain // 2 if isinstance(stage, Place) and stage.chain % 2 else None


def _assign_stages(
    graph: ir.Graph,
    blocks: Sequence[AlignedBlock],
    classes: Mapping[ir.Node, Class],
    cuts: Sequence[AlignedCut],
) -> dict[ir.Node, Stage]:
    """As late as possible, between the pins that the blocks set, at the level of the depth.

    Constants follow their consumers: ``extract`` clones them into every segment that reads them.
    """
    pins, caps = _pins_and_caps(blocks)
    depths, deepest = _depths(graph, cuts), len(cuts)
    stages: dict[ir.Node, Stage] = {}
    for node in reversed(list(graph)):
        if classes[node] in HOISTED:
            stages[node] = classes[node]
            continue
        users = [stages[user] for value in node.outputs for user, _ in value.uses()]
        limits = [stage for stage in users if isinstance(stage, Place)]
        stage = min((limit.chain for limit in limits), default=2 * len(blocks))
        stage = min(stage, caps.get(node, stage))
        if node in pins and pins[node] > stage:
            raise ExportError(
                f"{node.op_type} {node.outputs[0].name!r} belongs to stage {pins[node]} but is "
                f"read at stage {stage}: the blocks of this U-Net do not lie on one chain. "
                f"Please report the model's config."
            )
        level = min((limit.level for limit in limits), default=2 * deepest)
        behind = 2 * deepest - depths[node]  # the level of this depth on the way up
        stages[node] = Place(pins.get(node, stage), behind if level >= behind else depths[node])
    return stages


def _depths(graph: ir.Graph, cuts: Sequence[AlignedCut]) -> dict[ir.Node, int]:
    """How many of the cuts, the shallowest first, make a node superfluous when reused."""
    depths = dict.fromkeys(graph, len(cuts))
    for depth in reversed(range(len(cuts))):
        waiting = [_producer(value) for value in graph.outputs]
        needed = set(waiting)
        while waiting:
            for value in waiting.pop().inputs:
                producer = None if value is None else value.producer()
                if value is not cuts[depth].output and producer not in needed and producer:
                    needed.add(producer)
                    waiting.append(producer)
        depths.update(dict.fromkeys(needed, depth))
    return depths


def _pins_and_caps(
    blocks: Sequence[AlignedBlock],
) -> tuple[dict[ir.Node, int], dict[ir.Node, int]]:
    """Stages that nodes must have, and stages that they must not exceed."""
    pins: dict[ir.Node, int] = {}
    caps: dict[ir.Node, int] = {}
    for k, block in enumerate(blocks):
        pins[_producer(block.branch)] = 2 * k + 1
        pins.update(dict.fromkeys(block.sum, 2 * k + 2))
        # x must exist before the block runs: both the block and the sum read it.
        caps[_producer(block.residual)] = 2 * k
    return pins, caps


def _crossing_values(graph: ir.Graph, stages: Mapping[ir.Node, Stage]) -> list[ir.Value]:
    """Values produced in one stage and read in another, constants left out."""
    return [
        value
        for node in graph
        for value in node.outputs
        if any(stages[user] != stages[node] for user, _ in value.uses())
    ]


def _inputs(graph: ir.Graph, stage: Stage, stages: Mapping[ir.Node, Stage]) -> list[ir.Value]:
    """What a stage reads: graph inputs and values of other stages, in order of first use."""
    found: dict[ir.Value, None] = {}
    for node in graph:
        if stages[node] != stage:
            continue
        for value in node.inputs:
            if value is None or value.is_initializer():
                continue
            producer = value.producer()
            if producer is None or stages[producer] != stage:
                found[value] = None
    return list(found)


def _name_boundaries(
    crossing: Sequence[ir.Value], stages: Mapping[ir.Node, Stage], numbers: Mapping[Place, int]
) -> None:
    """Plain names: ``<role>_<index>`` for hoisted values, ``trunk_<k>_<index>`` for the trunk."""
    counters: Counter[str] = Counter()
    for value in crossing:
        stage = stages[_producer(value)]
        prefix = BOUNDARY_PREFIX[stage] if isinstance(stage, str) else f"trunk_{numbers[stage]}"
        value.name = f"{prefix}_{counters[prefix]}"
        counters[prefix] += 1


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None, value
    return node
