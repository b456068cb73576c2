"""Which presets of a bundle are compared with which: groups around an uncached run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from blockcache.runtime import Bundle, ConfigError, Preset, Provenance
from blockcache.runtime.run_table import flops_run
from blockcache.tools.sources.references import uncached

UNCACHED, FEWER = "uncached", "fewer steps"
OTHER_GRID = "uncached, other grid"
PLAIN = "none"
THRESHOLD = "threshold"
JOINT = "steps and reuse together"
KINDS = {
    "threshold-speedup": THRESHOLD,
    "change-budget": "budget by change",
    "joint": JOINT,
    "joint-latency": JOINT,
    "latency": "budget",
}
"""Names for policies whose kind does not say what they do."""
ALIGNMENTS = {
    "distil": "scale-shift, distilled",
    "history-distil": "history, distilled",
}
"""Names for alignments whose own name does not say what they do."""


@dataclass(frozen=True)
class Contestant:
    """One preset with its cost."""

    preset: Preset
    method: str  # "uncached", "fewer steps", "budget + history", "fewer steps + threshold", ...
    flops: float  # of one image, the whole U-Net
    block_flops: float  # of one image, the blocks alone

    @property
    def name(self) -> str:
        """The preset's name."""
        return self.preset.name

    @property
    def steps(self) -> int:
        """Solver steps of its own, not the reference's."""
        return self.preset.schedule.steps

    @property
    def kind(self) -> str:
        """How the schedule was made: "threshold" however its delta was chosen."""
        return _kind(self.preset)

    @property
    def alignment(self) -> str:
        """How reused outputs are aligned; "none" where they are reused as they are."""
        return _alignment(self.preset)

    @property
    def schedule(self) -> str:
        """The same for presets that recompute the same blocks at the same steps."""
        return hashlib.sha256(self.preset.schedule.recompute.tobytes()).hexdigest()[:8]


@dataclass(frozen=True)
class Group:
    """An uncached reference and everything that wants to be cheaper, same solver."""

    name: str  # "dpm-20"
    reference: Contestant
    others: tuple[Contestant, ...]  # fewer uncached steps first, then by method, dearest first
    converged: Preset | None = None  # what distances are taken to; None: the reference

    @property
    def contestants(self) -> tuple[Contestant, ...]:
        """The reference first."""
        return (self.reference, *self.others)

    @property
    def yardstick(self) -> Preset:
        """What distances are taken to."""
        return self.converged or self.reference.preset

    def own_uncached(self, contestant: Contestant) -> Preset | None:
        """The uncached run on a cached contestant's own steps; None for an uncached one.

        The reference itself, where it is that run.
        """
        preset = contestant.preset
        if _is_uncached(preset):
            return None
        if dict(preset.solver) == dict(self.reference.preset.solver):
            return self.reference.preset
        return dataclasses.replace(
            uncached(preset),
            name=f"{preset.name}-{UNCACHED}",
            provenance=Provenance(kind=UNCACHED),
        )

    @property
    def drawn(self) -> tuple[Preset, ...]:
        """Every preset that the comparison needs, the contestants first."""
        presets = tuple(contestant.preset for contestant in self.contestants)
        if self.converged is None:
            return presets
        own = (self.own_uncached(contestant) for contestant in self.contestants)
        return (*presets, self.converged, *(preset for preset in own if preset is not None))


@dataclass(frozen=True)
class Pairing:
    """Two contestants to compare, and why."""

    subject: Contestant
    other: Contestant
    against: str


def make_groups(
    bundle: Bundle,
    names: Sequence[str] = (),
    reference: str | None = None,
    *,
    any_grid: bool = False,
) -> list[Group]:
    """Groups of the named presets, or of all; references are added where not named.

    With ``reference``, an uncached preset, there is one group: everything of its solver with at
    most as many steps is compared with it, so that fewer steps and caching compete together.
    Otherwise a cached preset is compared with the uncached run of its own step count.

    A step count is a group where a cached preset has it; a solver without cached presets is one
    group, with its longest run as the reference. Where the bundle lacks the uncached preset of a
    group, it is made from a cached one, with every block recomputed.

    With ``any_grid``, presets of one solver compete wherever their steps lie, and the reference is
    the run on the steps of the model's own scheduler. That is fair where all are judged by the
    converged run, which is the same for every grid.

    Raises:
        ConfigError: ``reference`` is no uncached preset, or a named preset does not compete with
            it; or a joint preset's full number of steps is in no other preset.
    """
    solver_of = _family if any_grid else _all_but_steps
    if reference is not None:
        return [_reference_group(bundle, names, reference, solver_of)]
    chosen = [bundle.preset(name) for name in names or bundle.preset_names]
    everything = [bundle.preset(name) for name in bundle.preset_names]
    groups = []
    for solver in dict.fromkeys(map(solver_of, chosen)):
        mine = [preset for preset in chosen if solver_of(preset) == solver]
        cached = [preset for preset in mine if not _is_uncached(preset)]
        steps = {p.replaced_steps for p in cached} or {max(p.replaced_steps for p in mine)}
        references = [p for p in everything if _is_reference(p) and solver_of(p) == solver]
        references.sort(key=lambda preset: not _on_own_grid(preset))
        groups += [_group(bundle, mine, references, count) for count in sorted(steps)]
    return groups


def pairings(group: Group) -> list[Pairing]:
    """The comparisons that the paper's claims are about."""
    found = []
    fewer = [c for c in group.others if c.method in (FEWER, OTHER_GRID)]
    thresholds = [contestant for contestant in group.others if contestant.kind == THRESHOLD]
    for contestant in group.others:
        found.append(Pairing(contestant, group.reference, UNCACHED))
        if contestant in fewer:
            continue
        found += [Pairing(contestant, other, FEWER) for other in _all_nearest(contestant, fewer)]
        if contestant.alignment != PLAIN:
            found += [
                Pairing(contestant, p, "unaligned") for p in group.others if _plain(p, contestant)
            ]
        alike = [other for other in thresholds if _comparable(other, contestant)]
        if contestant.kind != THRESHOLD and alike:
            found.append(Pairing(contestant, _nearest(contestant, alike), THRESHOLD))
    return found


def image_flops(bundle: Bundle, preset: Preset) -> tuple[float, float]:
    """FLOPs of one image at the model's default sizes: the whole U-Net, the blocks alone."""
    run = flops_run(bundle.segments, preset.schedule)
    is_block = np.array([segment.role == "block" for segment in bundle.segments])
    once = sum(segment.flops for segment in bundle.segments if segment.role == "prompt")
    return once + float(run.sum()), float(run[is_block].sum())


def _group(bundle: Bundle, mine: list[Preset], references: list[Preset], steps: int) -> Group:
    cached = [p for p in mine if not _is_uncached(p) and p.replaced_steps == steps]
    of_steps = [p for p in (*references, *cached) if p.schedule.steps == steps]
    if not of_steps:
        joint = next(p for p in mine if p.replaced_steps == steps)
        raise ConfigError(
            f"Expected an uncached preset of {steps} steps beside {joint.name!r}, which takes its "
            f"place with {joint.schedule.steps}; there is none. Compile one with it."
        )
    reference = of_steps[0]
    name = f"{reference.solver['solver']}-{steps}"
    if not _is_uncached(reference):
        reference = dataclasses.replace(
            uncached(reference), name=f"{name}-{UNCACHED}", provenance=Provenance(kind=UNCACHED)
        )
    most = reference.schedule.steps
    plain = [p for p in mine if _is_uncached(p) and p.schedule.steps <= most]
    others = [p for p in plain if p.name != reference.name and _differs(p, reference)]
    return _around(bundle, name, reference, [*others, *cached])


def _reference_group(
    bundle: Bundle, names: Sequence[str], name: str, solver: Callable[[Preset], str]
) -> Group:
    """One group of all step counts up to the reference's."""
    everything = [bundle.preset(known) for known in bundle.preset_names]
    references = {preset.name: preset for preset in everything if _is_reference(preset)}
    if name not in references:
        raise ConfigError(
            f"--reference: expected an uncached preset of the bundle, got {name!r}. Uncached "
            f"presets there are: {', '.join(references) or 'none; compile one, such as dpm:20'}."
        )
    reference = references[name]
    named = [bundle.preset(other) for other in names if other != name]
    strange = [preset.name for preset in named if not _competes(preset, reference, solver)]
    if strange:
        raise ConfigError(
            f"--reference {name}: expected presets of the same solver and solver options with at "
            f"most {reference.schedule.steps} steps, cached if with as many; got "
            f"{', '.join(strange)}. Leave them out, or name another reference."
        )
    others = named if names else [p for p in everything if _competes(p, reference, solver)]
    return _around(bundle, name, reference, others)


def _around(bundle: Bundle, name: str, reference: Preset, others: Sequence[Preset]) -> Group:
    """A group in its order."""
    steps = reference.schedule.steps
    made = [_contestant(bundle, preset, _method(preset, steps)) for preset in others]
    made.sort(
        key=lambda contestant: (
            contestant.method not in (FEWER, OTHER_GRID),
            contestant.method,
            -contestant.flops,
        )
    )
    return Group(name, _contestant(bundle, reference, UNCACHED), tuple(made))


def _contestant(bundle: Bundle, preset: Preset, method: str) -> Contestant:
    return Contestant(preset, method, *image_flops(bundle, preset))


def _method(preset: Preset, steps: int) -> str:
    """What makes it cheaper than the uncached run of ``steps`` steps."""
    fewer = preset.schedule.steps < steps and _kind(preset) != JOINT
    if _is_uncached(preset):
        return FEWER if preset.schedule.steps < steps else OTHER_GRID
    parts = [FEWER] if fewer else []
    alignment = _alignment(preset)
    parts += [_kind(preset)] if alignment == PLAIN else [_kind(preset), alignment]
    return " + ".join(parts)


def _kind(preset: Preset) -> str:
    name = preset.provenance.kind
    return KINDS.get(name, name)


def _alignment(preset: Preset) -> str:
    name = preset.provenance.alignment or PLAIN
    return ALIGNMENTS.get(name, name)


def _is_uncached(preset: Preset) -> bool:
    return bool(preset.schedule.recompute.all())


def _is_reference(preset: Preset) -> bool:
    """Whether others may be compared with it: it is uncached, and replaces no longer run."""
    return _is_uncached(preset) and preset.replaced_steps == preset.schedule.steps


def _competes(preset: Preset, reference: Preset, solver: Callable[[Preset], str]) -> bool:
    """Whether the preset wants to be cheaper than the uncached reference, by the same solver."""
    few = preset.schedule.steps <= reference.schedule.steps
    return few and _differs(preset, reference) and solver(preset) == solver(reference)


def _differs(preset: Preset, reference: Preset) -> bool:
    """Whether a preset of its own: not the reference once more."""
    return not _is_uncached(preset) or dict(preset.solver) != dict(reference.solver)


def _all_but_steps(preset: Preset) -> str:
    """The solver with all its options but the number of steps."""
    return json.dumps({k: v for k, v in preset.solver.items() if k != "steps"}, sort_keys=True)


def _family(preset: Preset) -> str:
    """The solver and the model's training, wherever the steps lie."""
    kept = {key: preset.solver.get(key) for key in ("solver", "prediction", "noise")}
    return json.dumps(kept, sort_keys=True)


def _on_own_grid(preset: Preset) -> bool:
    """Whether the steps lie where the model's own scheduler puts them."""
    return preset.solver.get("grid") is None


def _plain(candidate: Contestant, contestant: Contestant) -> bool:
    """Whether ``candidate`` has the same steps and schedule, and no alignment."""
    same = (candidate.steps, candidate.schedule) == (contestant.steps, contestant.schedule)
    return same and candidate.alignment == PLAIN


def _comparable(threshold: Contestant, contestant: Contestant) -> bool:
    """Whether only the way to choose the schedule differs: same steps, same alignment."""
    return (threshold.steps, threshold.alignment) == (contestant.steps, contestant.alignment)


def _nearest(contestant: Contestant, others: Sequence[Contestant]) -> Contestant:
    """The closest in FLOPs of the whole U-Net."""
    return min(others, key=lambda other: _away(contestant, other))


def _all_nearest(contestant: Contestant, others: Sequence[Contestant]) -> list[Contestant]:
    """The closest in FLOPs, every one of them where several grids have as many steps."""
    least = min((_away(contestant, other) for other in others), default=0)
    return [other for other in others if _away(contestant, other) == least]


def _away(contestant: Contestant, other: Contestant) -> float:
    return abs(math.log(other.flops / contestant.flops))
