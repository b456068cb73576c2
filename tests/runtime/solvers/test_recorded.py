"""What a preset records of its solver, and refusals of what it cannot have recorded."""

import json

import pytest

from blockcache.runtime.errors import ConfigError
from blockcache.runtime.solvers.recorded import DiffusersScheduler, recorded_solver, timesteps_of
from blockcache.runtime.solvers.solver import SolverConfig

HEUN = DiffusersScheduler(
    scheduler="HeunDiscreteScheduler",
    config={"beta_schedule": "scaled_linear", "trained_betas": None},
    inference_steps=2,
    timesteps=(999.0, 500.5, 500.5),
)


@pytest.mark.parametrize("solver", [HEUN, SolverConfig(solver="euler-a", steps=3)])
def test_json_round_trip(solver):
    assert recorded_solver(json.loads(json.dumps(solver.to_json()))) == solver
    assert len(timesteps_of(solver)) == solver.steps == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheduler": "os.system"}, "scheduler: expected the name of a class, got 'os.system'"),
        ({"scheduler": 3}, "scheduler: expected the name of a class, got 3"),
        ({"config": [1]}, r"config: expected options by name, got \[1\]"),
        ({"config": {"a": float("inf")}}, "config: expected values that JSON has"),
        ({"inference_steps": 0}, "inference_steps: expected a whole number of 1 or more, got 0"),
        ({"timesteps": []}, "timesteps: expected finite numbers, one an evaluation"),
        ({"timesteps": [1.0, "2", 3.0]}, "timesteps: expected finite numbers"),
        ({"timesteps": [1.0]}, "steps: expected 1 timesteps, got 3"),
        ({"steps": 4}, "steps: expected 3 timesteps, got 4"),
        ({"more": 1}, r"Expected \['scheduler', 'config', 'inference_steps', 'timesteps'\], got"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        recorded_solver({**HEUN.to_json(), **changes})
