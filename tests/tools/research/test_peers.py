"""Other cachers: their forecasts on known curves, and that they leave a model as it was."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from blockcache.export.measure.calibration import Calibration  # noqa: E402
from blockcache.export.measure.sampling import Sampling  # noqa: E402
from blockcache.runtime.solvers.solver import SolverConfig  # noqa: E402
from blockcache.tools.research.peers import (  # noqa: E402
    DeepCache,
    Spectrum,
    TaylorSeer,
    Uncached,
    _TaylorBranch,
    cost_in_steps,
    draw,
)


def curve(at, *factors):
    """A feature that is a polynomial of time."""
    return torch.full((1, 2, 1, 1), float(sum(f * at**i for i, f in enumerate(factors))))


def test_a_taylor_forecast_of_second_order_follows_a_parabola_by_its_differences():
    branch = _TaylorBranch(torch.nn.Identity(), 3, 2)
    for at in (0, 1, 2):
        branch.keep(curve(at, 1, 2, 3))
    branch.ahead = 0.5  # differences stand in for derivatives: 17 + 11 / 2 + 6 / 8
    assert branch.reused().unique().item() == pytest.approx(17 + 11 * 0.5 + 6 * 0.5**2 / 2)
    branch.kept = branch.kept[:1]
    assert branch.reused().unique().item() == 17


def test_spectrum_forecasts_what_it_was_fitted_to():
    times = [0, 1, 2, 3, 4, 6, 8]
    features = [curve(at / 10, 1, 2) for at in times]
    exact = Spectrum(0.25, ridge=1e-9).forecast(times, features, 10, 20)
    assert exact.unique().item() == pytest.approx(3, abs=1e-5)
    line = Spectrum(0.25, share=0).forecast(times, [curve(t, 0, 0, 1) for t in times], 9, 20)
    assert line.unique().item() == pytest.approx(64 + (64 - 36) / 2)


def test_spectrum_leaves_out_more_and_more():
    runs = Spectrum(1).computed(20)
    assert [step for step, ran in enumerate(runs) if ran] == [0, 1, 2, 3, 4, 6, 9, 13, 18]
    assert all(Spectrum(0, span=1).computed(20))


@pytest.fixture(scope="module")
def sampling(tiny_models, conditions_of):
    model = tiny_models("sd")
    calibration = Calibration(conditions_of(model, 2), conditions_of(model, 1, seed=1))
    solver = SolverConfig(solver="dpm", steps=6, prediction="v_prediction")
    return Sampling(model, solver, calibration, 3.0)


@pytest.mark.parametrize("peer", [TaylorSeer(1, 2), Spectrum(0, warm_up=6), DeepCache(1)])
def test_where_every_step_is_computed_nothing_changes(sampling, peer):
    if isinstance(peer, DeepCache):
        pytest.importorskip("DeepCache")
    jobs = [(0, 7), (1, 8)]
    plain = draw(sampling, Uncached(), jobs)
    assert (draw(sampling, peer, jobs) == plain).all()


@pytest.mark.parametrize("peer", [TaylorSeer(2, 1), Spectrum(0, warm_up=2), DeepCache(2)])
def test_a_cacher_saves_and_leaves_the_model_as_it_was(sampling, peer):
    if isinstance(peer, DeepCache | TaylorSeer):
        pytest.importorskip("DeepCache")
    jobs = [(0, 7)]
    plain = draw(sampling, Uncached(), jobs)
    cached = draw(sampling, peer, jobs)
    assert 1e-4 < np.abs(cached - plain).max() < np.abs(plain).max()
    assert 2 < cost_in_steps(sampling, peer.costs_like()) < 5
    assert (draw(sampling, Uncached(), jobs) == plain).all()
