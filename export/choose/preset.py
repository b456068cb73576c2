"""What a preset is asked to be: ``dpm:20:x2``, or its name, and what that means.

In place of a solver may stand ``scheduler``, the model's own scheduler of diffusers, or a class of
diffusers (``HeunDiscreteScheduler:20``): the caller then runs it.
The noise levels that it visits are the scheduler's own, or a grid named behind the solver:
``dpm-karras:20``, ``dpm-auto:20:branch2:history`` (see ``grids.py``), or a list of one's own in a
file: ``dpm-levels.json:8``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from blockcache.export.choose import grids
from blockcache.export.choose.policies import UNCACHED, Chosen, Needs, Policy
from blockcache.export.measure.reuse import HISTORY, PLAIN, SCALE_SHIFT
from blockcache.runtime.errors import ConfigError
from blockcache.runtime.solvers.recorded import SCHEDULER
from blockcache.runtime.solvers.solver import SOLVERS, STOCHASTIC

ALIGNMENTS = {"none": 1, "scale-shift": 1, "distil": 1, "history": 2, "history-distil": 2}
"""Ways to align reused outputs, and how many computed outputs of a block they combine."""

GRIDS = (grids.AUTO, *grids.SPACINGS, *grids.NAMES)
"""Names of grids that may stand behind a solver."""

_THEIRS = "[A-Za-z0-9]+Scheduler"
"""Classes of diffusers' schedulers."""

MOST_STEPS = 1000
"""A model is trained on this many timesteps; no solver here visits more."""


MOST_FITTED = 25
"""Steps on the grid ``auto`` to which a solver is fitted, at most."""


@dataclass(frozen=True, kw_only=True)
class PresetOptions:
    """One preset to make.

    Raises:
        ConfigError: an unknown solver, grid or alignment, steps out of range, or an alignment of
            nothing.

    Examples:
        >>> PresetOptions.parse("dpm:20:0.5").name
        'dpm-20-d0.5'
        >>> PresetOptions.parse("ddim-50-x1.6").outputs
        2
    """

    solver: str
    steps: int
    policy: Policy = UNCACHED
    alignment: str = ""  # one of ``ALIGNMENTS``; "" stands for the policy's own
    grid: str | None = None
    """One of ``GRIDS``, or a file of levels (.json); None: as the scheduler's config has them."""
    scheduler: str | None = None
    """A folder or class of diffusers where the solver is ``scheduler``; None: the model's own."""
    name: str = ""

    def __post_init__(self) -> None:
        if self.solver not in (*SOLVERS, SCHEDULER):
            raise ConfigError(f"Expected a solver of {(*SOLVERS, SCHEDULER)}, got {self.solver!r}.")
        if self.grid is not None and not self.has_own_levels and self.grid not in GRIDS:
            raise ConfigError(
                f"Expected a grid of {', '.join(GRIDS)}, or FILE.json, got {self.grid!r}."
            )
        if not 1 <= self.steps <= MOST_STEPS:
            raise ConfigError(f"Expected 1 to {MOST_STEPS} steps, got {self.steps}.")
        if not self.alignment:
            object.__setattr__(self, "alignment", self.policy.alignment)
        if self.alignment not in ALIGNMENTS:
            raise ConfigError(
                f"Expected an alignment of {', '.join(ALIGNMENTS)}, got {self.alignment!r}."
            )
        if self.alignment != "none" and self.policy == UNCACHED:
            raise ConfigError("An uncached preset reuses nothing that could be aligned.")
        if self.scheduler is not None and self.solver != SCHEDULER:
            raise ConfigError(
                f"Expected the solver {SCHEDULER!r} with a scheduler of diffusers (preset "
                f"{SCHEDULER}:{self.steps}), got {self.solver!r}."
            )
        if self.solver == SCHEDULER and (self.grid or isinstance(self.policy, Chosen)):
            raise ConfigError(
                f"A scheduler of diffusers places its own steps: expected neither a grid nor an x "
                f"or ms policy with the solver {SCHEDULER!r}. Take another policy (branch2, "
                f"blocks1.5), or a solver of dpm, unipc, ddim, euler."
            )
        if self.solver in STOCHASTIC and (
            isinstance(self.policy, Chosen) or self.grid == grids.AUTO
        ):
            raise ConfigError(
                f"The solver {self.solver!r} adds noise at every step, so that its runs end at no "
                f"converged one, by which x and ms policies and the grid auto are measured. Take "
                f"{self._with_the_same_noise}, or a solver of dpm, unipc, ddim, euler."
            )
        if self.has_own_levels:
            if isinstance(self.policy, Chosen):
                raise ConfigError(
                    f"The policy {self.policy.text!r} chooses the levels: expected no list of "
                    f"them, got {self.grid!r}. Take another policy, such as branch2."
                )
            self.own_levels()
        if isinstance(self.policy, Chosen) and self.outputs != 2:
            raise ConfigError(
                f"The policy {self.policy.text!r} plans with two outputs: expected the alignment "
                f"history or history-distil, got {self.alignment!r}."
            )
        if not self.name:
            ending = "" if self.alignment == self.policy.alignment else self.alignment
            parts = (self._runs, self.grid_name, str(self.steps), self.policy.text, ending)
            object.__setattr__(self, "name", "-".join(part for part in parts if part))

    @classmethod
    def parse(cls, text: str) -> PresetOptions:
        """Read ``SOLVER[-GRID]:STEPS[:POLICY[:ALIGNMENT]]``, or the same with dashes: a name."""
        sampler, steps, policy, alignment = _parts(text)
        solver, grid = _solver_and_grid(sampler)
        scheduler = None
        if re.fullmatch(_THEIRS, solver):
            solver, scheduler = SCHEDULER, solver
        if not re.fullmatch("[0-9]{1,10}", steps):
            raise _unreadable(text)
        return cls(
            solver=solver,
            steps=int(steps),
            policy=UNCACHED if policy is None else Policy.parse(policy),
            alignment=alignment or "",
            grid=grid or None,
            scheduler=scheduler,
        )

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
        measured = bool(self.policy.needs & (Needs.CHANGE | Needs.LOSSES))
        return measured or self.alignment != "none" or self.grid == grids.AUTO

    @property
    def fits_solver(self) -> bool:
        """Whether the solver's coefficients are fitted: where the grid is measured or chosen.

        Not in many steps, which end about as near to the converged run as what they would be fitted
        to (``TrialOptions.steps``).
        """
        few = self.grid == grids.AUTO and self.steps <= MOST_FITTED
        return few or isinstance(self.policy, Chosen)

    @property
    def sampler(self) -> str:
        """Solver, grid and steps, as titles name them: "dpm-karras-20"."""
        return "-".join(part for part in (self._runs, self.grid_name, str(self.steps)) if part)

    @property
    def has_own_levels(self) -> bool:
        """Whether the grid is a list of one's own, in a file."""
        return self.grid is not None and self.grid.endswith(".json")

    @property
    def grid_name(self) -> str | None:
        """The grid as names have it: of a file its stem, in the letters that names may have."""
        if self.grid is None or not self.has_own_levels:
            return self.grid
        return re.sub("[^A-Za-z0-9._]", "_", Path(self.grid).stem[:60])

    def own_levels(self) -> tuple[float, ...]:
        """The levels of the file, [S]; ConfigError where it is no such list."""
        assert self.grid is not None
        return grids.read_levels(Path(self.grid), self.steps)

    @property
    def _runs(self) -> str:
        """The solver, or which scheduler: its class, or the folder that its config lies in."""
        if self.scheduler is None:
            return self.solver
        if re.fullmatch(_THEIRS, self.scheduler):
            return self.scheduler
        folder = Path(self.scheduler).resolve()
        named = folder.parent if folder.name == SCHEDULER else folder  # a pipeline's scheduler/
        return f"{SCHEDULER}." + re.sub("[^A-Za-z0-9.]", "_", named.name)

    @property
    def _with_the_same_noise(self) -> str:
        """The nearest preset that is measured step by step, each run with the same noise."""
        grid = "karras" if self.grid == grids.AUTO else self.grid
        sampler = "-".join(part for part in (self.solver, grid) if part)
        if not isinstance(self.policy, Chosen):
            return f"{sampler}:{self.steps}"
        policy = self.policy.text.replace("x", "branch", 1).replace("ms", "blocksms", 1)
        return f"{sampler}:{self.steps}:{policy}:history (the same steps and noise, with reuse)"


def _parts(text: str) -> tuple[str, str, str | None, str | None]:
    """Solver and grid, steps, policy and alignment; the last two None where left out."""
    text = re.sub(r"([:-][a-z]+):max(?=[:-]|$)", r"\1max", text)  # t:max is one part
    if ":" not in text:
        return _dashed(text)
    solver, steps, *more = text.split(":")
    if len(more) > 2:
        raise _unreadable(text)
    policy, alignment = [*more, None, None][:2]
    return solver, steps, policy, alignment


def _solver_and_grid(sampler: str) -> tuple[str, str]:
    """``dpm-sde-karras`` is the solver dpm-sde on the grid karras; no grid is called sde."""
    for solver in sorted((*SOLVERS, SCHEDULER), key=len, reverse=True):
        if sampler == solver or sampler.startswith(f"{solver}-"):
            return solver, sampler[len(solver) + 1 :]
    solver, _, grid = sampler.partition("-")
    return solver, grid


def _dashed(text: str) -> tuple[str, str, str | None, str | None]:
    """The parts of a name; the longest alignment that ends it is one, the rest is the policy."""
    grid = "|".join(re.escape(name) for name in GRIDS)
    solver = "|".join((*(re.escape(name) for name in SOLVERS if "-" in name), _THEIRS, "[a-z]*"))
    match = re.fullmatch(rf"((?:{solver})(?:-(?:{grid}))?)-([^-]*)(?:-(.*))?", text, re.DOTALL)
    if match is None:
        raise _unreadable(text)
    solver, steps, rest = match.groups()
    if rest is None:
        return solver, steps, None, None
    for alignment in sorted(ALIGNMENTS, key=len, reverse=True):
        if rest.endswith(f"-{alignment}"):
            return solver, steps, rest.removesuffix(f"-{alignment}"), alignment
    return solver, steps, rest, None


def _unreadable(text: str) -> ConfigError:
    return ConfigError(
        f"Expected a preset SOLVER[-GRID]:STEPS[:POLICY[:ALIGNMENT]] such as dpm:20:0.5, "
        f"dpm:20:x2 or dpm-karras:20, got {text!r}."
    )
