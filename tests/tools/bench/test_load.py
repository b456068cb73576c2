"""The load test and the soak, on a tiny bundle."""

from __future__ import annotations

import json
from concurrent.futures import Future

import numpy as np
import pytest

from blockcache.runtime import BatchFuture, ConfigError, ContinuousBatch
from blockcache.tools.bench import load, soak


@pytest.fixture(scope="module")
def bundle(compiled):
    return compiled("small")[1]


def test_every_way_serves_every_kind_of_arrivals(bundle, tmp_path, capsys):
    options = {"preset": ["ddim:4"], "slots": [2], "requests": 4, "load": 0.9, "threads": 2}
    load.main(str(bundle.folder), **options, out=tmp_path)
    served = json.loads((tmp_path / "load.json").read_text())["served"]
    ways = ["one by one", "2 sessions, one thread each", "static 2", "continuous 2"]
    assert [(s["way"], s["arrivals"]) for s in served] == [
        (way, kind) for way in ways for kind in ("burst", "Poisson 90%")
    ]
    assert all(0 < s["p50_s"] <= s["p95_s"] and s["cpu_s_an_image"] > 0 for s in served)
    bursts = {s["way"]: s for s in served if s["arrivals"] == "burst"}
    shared = {way: made["images_a_launch"] for way, made in bursts.items()}
    assert shared["one by one"] == shared["2 sessions, one thread each"] == 1
    assert 1 < shared["continuous 2"] <= 2
    rates = {s["requests_per_second"] for s in served}
    assert len(rates) == 2, "every way has the same arrivals"
    assert None in rates
    assert (tmp_path / "load.svg").stat().st_size > 1000
    page = (tmp_path / "load.md").read_text()
    assert page.count("| ddim-4 |") == 8
    assert "engines on 2 thread(s)" in page
    assert capsys.readouterr().out.strip() in page


def test_latency_runs_from_the_arrival():
    done: Future[object] = Future()
    done.set_result(None)
    span, _, latencies = load.serve(lambda _: done, [0.0, 0.05])
    assert span >= 0.05
    assert (latencies < 0.05).all()


def test_arrivals_have_the_rate_that_was_asked_for():
    offsets = np.array(load.poisson(4000, rate=5.0))
    assert offsets[0] == 0
    assert np.diff(offsets).mean() == pytest.approx(0.2, rel=0.05)


def test_a_model_that_takes_more_than_a_prompt_is_refused(compiled):
    with pytest.raises(ConfigError, match="Expected a model that takes a prompt alone"):
        load.prompts_of(compiled("class-conditioned")[1])


def test_the_soak_ends_well(bundle):
    with ContinuousBatch.open(bundle, slots=2, presets=["ddim:4"], threads=1) as batch:
        found = soak.soak(batch, 30)
    assert found["finished"] + found["cancelled"] == found["submitted"] == 30
    assert found["cancelled"] > 0


def test_a_growing_process_fails_the_soak(bundle, monkeypatch):
    sizes = iter(range(1000, 10_000_000, 1000))
    monkeypatch.setattr(soak, "_resident_bytes", lambda: next(sizes))
    with (
        ContinuousBatch.open(bundle, slots=2, presets=["ddim:4"], threads=1) as batch,
        pytest.raises(soak.SoakError, match="Expected memory that stays, got"),
    ):
        soak.soak(batch, 20)


def test_an_unexpected_outcome_fails_the_soak():
    failed = BatchFuture(lambda: None)
    failed.set_exception(ValueError("odd"))
    with pytest.raises(soak.SoakError, match="Expected latents, got ValueError"):
        soak._count({failed}, {})
