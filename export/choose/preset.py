"""What a preset is asked to be: ``dpm:20:x1.5:history`` and what that means."""

from __future__ import annotations

from dataclasses import dataclass

from blockcache.export.choose.policies import UNCACHED, Policy
from blockcache.runtime.errors import ConfigError

SOLVERS = ("dpm", "ddim", "euler")
ALIGNMENTS = {"none": 1, "least-squares": 1, "distil": 1, "history": 2, "history-distil": 2}
"""Ways to align reused outputs, and how many computed outputs of a block they combine."""

REUSES = PLAIN, SCALE_SHIFT, HISTORY = "plain", "scale-shift", "history"
"""What takes an output's place: the last one, that scaled and shifted, or the last two combined."""


@dataclass(frozen=True, kw_only=True)
class PresetOptions:
    """One preset to make.

    Examples:
        >>> PresetOptions.parse("dpm:20:0.5").name
        'dpm-20-d0.5'
        >>> PresetOptions.parse("ddim:50:x1.6:history").outputs
        2
    """

    solver: str
    steps: int
    policy: Policy = UNCACHED
    alignment: str = "none"
    name: str = ""

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ConfigError(f"Expected a solver of {SOLVERS}, got {self.solver!r}.")
        if self.steps < 1:
            raise ConfigError(f"Expected steps of 1 or more, got {self.steps}.")
        if self.alignment not in ALIGNMENTS:
            raise ConfigError(
                f"Expected an alignment of {', '.join(ALIGNMENTS)}, got {self.alignment!r}."
            )
        if self.alignment != "none" and self.policy.kind == "uncached":
            raise ConfigError("An uncached preset reuses nothing that could be aligned.")
        if not self.name:
            ending = "" if self.alignment == "none" else self.alignment
            parts = (self.solver, str(self.steps), self.policy.text, ending)
            object.__setattr__(self, "name", "-".join(part for part in parts if part))

    @classmethod
    def parse(cls, text: str) -> PresetOptions:
        """Read ``SOLVER:STEPS[:POLICY[:ALIGNMENT]]``."""
        solver, _, rest = text.partition(":")
        steps, *more = rest.split(":")
        if not steps.isdecimal() or len(more) > 2:
            raise ConfigError(
                f"Expected a preset SOLVER:STEPS[:POLICY[:ALIGNMENT]] such as dpm:20:0.5 or "
                f"dpm:20:x1.5:history, got {text!r}."
            )
        policy = Policy.parse(more[0]) if more else UNCACHED
        alignment = more[1] if len(more) == 2 else "none"
        return cls(solver=solver, steps=int(steps), policy=policy, alignment=alignment)

    @property
    def outputs(self) -> int:
        """How many computed outputs of a block its alignment combines: 1 or 2."""
        return ALIGNMENTS[self.alignment]

    @property
    def reuse(self) -> str:
        """What takes the place of an output, as ``residuals`` calls it."""
        if self.alignment == "none":
            return PLAIN
        return HISTORY if self.outputs == 2 else SCALE_SHIFT

    @property
    def calibrated(self) -> bool:
        """Whether prompts are needed to make it."""
        return self.policy.measured or self.alignment != "none"
