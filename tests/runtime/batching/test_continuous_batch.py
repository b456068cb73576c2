"""The continuous batch: every request's latents are those that it gets alone."""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from blockcache.runtime import (
    Alignment,
    BatchFuture,
    Cancelled,
    ConfigError,
    ContinuousBatch,
    DeadlineError,
    EmptyBackend,
    EngineError,
    InputError,
    QueueFullError,
    Schedule,
    Session,
)
from blockcache.runtime.engines import ort
from blockcache.runtime.plan import row_specs

CUTS = (-1, 0, 1, 2)
SOLVERS = {"cached-dpm": "dpm-20", "cached-ddim": "ddim-4", "noisy": "dpm-20", "uncached": "dpm-20"}
"""The presets that requests ask for, and the one of the bundle that each is made from."""


def preset_of(bundle, name, seed, steps):
    """A preset of few steps; unless it is uncached, half of everything is reused, and aligned."""
    rng = np.random.default_rng(seed)
    found = bundle.preset(SOLVERS[name])
    recompute = rng.random((steps, len(bundle.model.blocks))) < (2 if name == "uncached" else 0.5)
    recompute[0] = True
    identity = Alignment.identity(steps, bundle.model.block_channels, bundle.model.outputs)
    tables = [t + rng.normal(0, 0.05, t.shape).astype(np.float32) for t in identity.tables]
    for k, (table, same) in enumerate(zip(tables, identity.tables, strict=True)):
        table[recompute[:, k]] = same[recompute[:, k]]
    rows = np.arange(steps) % found.schedule.steps
    solver = {**found.solver, "steps": steps}
    return dataclasses.replace(
        found,
        name=name,
        solver={**solver, "solver": "euler-a"} if name == "noisy" else solver,
        schedule=Schedule(recompute),
        alignment=Alignment(tuple(tables)),
        time_tables={key: table[rows] for key, table in found.time_tables.items()},
    )


@pytest.fixture(scope="module")
def bundle(compiled):
    return compiled("sd", 2, cuts=CUTS)[1]


@pytest.fixture(scope="module")
def presets(bundle):
    lengths = zip(SOLVERS, (6, 4, 5, 3), strict=True)
    return [preset_of(bundle, name, seed, steps) for seed, (name, steps) in enumerate(lengths)]


@pytest.fixture(scope="module")
def backend():
    return ort.OrtBackend(threads=1)


@pytest.fixture(scope="module")
def alone(bundle, presets, backend):
    """``alone(preset, **request)``: the latents that a session gives, and how it ran."""
    sessions = {preset.name: Session(bundle, preset, backend) for preset in presets}
    return lambda preset, **request: sessions[preset].denoise(**request)


@pytest.fixture
def open_batch(bundle, presets, backend):
    """``open_batch(slots=..., queue=..., backend=...)``; closed at the end, whatever happens."""
    opened = []

    def open_(slots=3, queue=64, backend=backend):
        batch = ContinuousBatch(
            bundle, presets, backend, bundle.model.sizes, slots=slots, queue=queue
        )
        opened.append(batch)
        return batch

    yield open_
    for batch in opened:
        batch.close(drain=False)


def request(bundle, seed, *, guidance=3.0, late=0, rescale=0.0):
    """Keyword arguments of a request, for a session or a batch."""
    rng = np.random.default_rng(seed)
    prompt, negative = rng.standard_normal((2, 1, 7, 32)).astype(np.float32)
    image = rng.standard_normal((1, 4, 16, 16)).astype(np.float32) if late else None
    return {
        "noise": rng.standard_normal((1, 4, 16, 16)).astype(np.float32),
        "prompt_embeds": prompt,
        "negative_prompt_embeds": negative,
        "guidance_scale": guidance,
        "guidance_rescale": rescale,
        "seeds": [seed],
        "image_latents": image,
        "start_step": late,
    }


def relative(a, b):
    return float(np.abs(a - b).max() / np.abs(b).max())


requests = st.fixed_dictionaries(
    {
        "preset": st.sampled_from(list(SOLVERS)),
        "seed": st.integers(0, 2**32 - 1),
        "guidance": st.sampled_from([1.0, 1.5, 4.0]),
        "rescale": st.sampled_from([0.0, 0.7]),
        "late": st.integers(0, 2),
        "fate": st.sampled_from(["runs", "runs", "runs", "cancelled", "expires", "fails"]),
        "pause": st.sampled_from([0.0, 0.0, 0.03]),
    }
)


@settings(
    max_examples=6,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # a batch's timing does not shrink
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(asked=st.lists(requests, min_size=2, max_size=8), slots=st.integers(1, 4))
def test_each_request_gets_what_it_gets_alone(bundle, open_batch, alone, asked, slots):
    batch = open_batch(slots)
    futures = []
    for each in asked:
        keys = ("guidance", "late", "rescale")
        made = request(bundle, each["seed"], **{key: each[key] for key in keys})
        poisoned = {**made, "noise": made["noise"] * np.float32(1e36)}  # overflows on its way
        given_ = poisoned if each["fate"] == "fails" else made
        deadline = 0.0 if each["fate"] == "expires" else None
        future = batch.submit(**given_, preset=each["preset"], deadline=deadline)
        if each["fate"] == "cancelled":
            future.cancel()
        futures.append((each, made, future))
        time.sleep(each["pause"])
    batch.close()
    for each, made, future in futures:
        error = future.exception(timeout=0)
        if each["fate"] == "runs":
            result = future.result()
            expected = alone(each["preset"], **made)
            assert relative(result.latents, expected.latents) <= 1e-5
            assert result.launches == expected.record.ran.sum() + 1  # the prompt segment
            assert result.steps == len(expected.record.steps)
        elif each["fate"] == "fails":
            assert isinstance(error, InputError)
            assert "the denoised latents: expected finite numbers" in str(error)
        elif each["fate"] == "expires":
            assert isinstance(error, DeadlineError)
        else:
            assert error is None or isinstance(error, Cancelled)
    counters = batch.counters()
    assert (counters.waiting, counters.active) == (0, 0)
    ended = counters.finished + counters.failed + counters.cancelled + counters.expired
    assert ended == counters.submitted == len(asked)
    shared = sum(images * count for images, count in counters.launches_of_images.items())
    assert shared == counters.launches + counters.launches_saved


def test_requests_at_different_steps_share_launches(bundle, open_batch):
    batch = open_batch(slots=4)
    futures = [batch.submit(**request(bundle, seed), preset="cached-dpm") for seed in range(4)]
    assert all(np.isfinite(f.result().latents).all() for f in futures)
    counters = batch.counters()
    assert counters.launches < 0.6 * (counters.launches + counters.launches_saved)
    assert max(counters.launches_of_images) > 2
    assert counters.images_a_launch > 1.6


def test_a_callback_sees_every_step_and_its_error_ends_its_own_request_alone(bundle, open_batch):
    batch, seen = open_batch(), []

    def broken(_):
        raise ZeroDivisionError

    watched = batch.submit(**request(bundle, 0), preset="uncached", callback=seen.append)
    failing = batch.submit(**request(bundle, 1), preset="uncached", callback=broken)
    latents = watched.result().latents
    assert [(each.step, each.steps) for each in seen] == [(0, 3), (1, 3), (2, 3)]
    assert seen[0].timestep > seen[1].timestep
    assert (seen[0].latents != latents).any()
    np.testing.assert_array_equal(seen[-1].latents, latents)
    with pytest.raises(ZeroDivisionError):
        failing.result()
    assert batch.counters().failed == 1


def test_conditions_beside_the_prompt(compiled, conditions_of):
    model, bundle = compiled("sdxl")
    positive, negative = conditions_of(model, 3, seed=1), conditions_of(model, 3, seed=2)
    name = "encoder_hidden_states"

    def of(i):
        return {
            "prompt_embeds": positive[name][i : i + 1],
            "negative_prompt_embeds": negative[name][i : i + 1],
            "conditions": {k: v[i : i + 1] for k, v in positive.items() if k != name},
            "negative_conditions": {k: v[i : i + 1] for k, v in negative.items() if k != name},
            "guidance_scale": 2.0,
        }

    session = Session.open(bundle, preset="ddim-4", threads=1)
    with ContinuousBatch.open(bundle, slots=2, presets=["ddim:4"], threads=1) as batch:
        noise = batch.noise([0, 1, 2])
        np.testing.assert_array_equal(noise, session.noise([0, 1, 2]))
        futures = [batch.submit(noise[i : i + 1], **of(i)) for i in range(3)]
    for i, future in enumerate(futures):
        expected = session.denoise(noise[i : i + 1], **of(i)).latents
        assert relative(future.result().latents, expected) <= 1e-5


# -- life ------------------------------------------------------------------------------------------


class SlowBackend(EmptyBackend):
    """Engines that do nothing, and only once they may go on."""

    name = "slow"

    def __init__(self):
        super().__init__()
        self.goes_on = threading.Event()
        self.error = None

    def load(self, bundle, segment):
        return SlowEngine(self)


class SlowEngine:
    def __init__(self, backend):
        self._backend = backend

    def bind(self, tensors):
        return self._launch

    def _launch(self):
        assert self._backend.goes_on.wait(60)
        if self._backend.error is not None:
            raise self._backend.error


@pytest.fixture
def slow():
    made = SlowBackend()
    yield made
    made.goes_on.set()


def test_what_has_no_slot_waits_in_the_order_of_arrival(bundle, open_batch, slow):
    batch = open_batch(slots=1, backend=slow)
    order = []
    for i in range(4):
        future = batch.submit(**request(bundle, i), preset="uncached")
        future.add_done_callback(lambda _, i=i: order.append(i))
    while not batch.counters().active:
        time.sleep(0.001)
    assert batch.counters().waiting == 3
    slow.goes_on.set()
    batch.close()
    assert order == [0, 1, 2, 3]


def test_a_running_request_is_cancelled_before_its_next_step(bundle, open_batch, slow):
    batch = open_batch(slots=2, backend=slow)
    first, second = (batch.submit(**request(bundle, i), preset="uncached") for i in range(2))
    while batch.counters().active < 1:
        time.sleep(0.001)
    assert first.cancel()
    slow.goes_on.set()
    with pytest.raises(Cancelled, match="The request was cancelled; others go on"):
        first.result(timeout=60)
    assert second.result(timeout=60).steps == 3
    assert not second.cancel()


def test_the_queue_is_bounded(bundle, open_batch, slow):
    batch = open_batch(slots=1, queue=1, backend=slow)
    batch.submit(**request(bundle, 0))
    while batch.counters().waiting:
        time.sleep(0.001)
    batch.submit(**request(bundle, 1))
    with pytest.raises(QueueFullError, match="Expected at most 1 requests that wait for a slot"):
        batch.submit(**request(bundle, 2))
    slow.goes_on.set()


def test_a_deadline_passes_while_a_request_runs(bundle, open_batch, slow):
    batch = open_batch(slots=1, backend=slow)
    future = batch.submit(**request(bundle, 0), deadline=0.2)
    while batch.counters().active < 1:
        time.sleep(0.001)
    time.sleep(0.2)
    slow.goes_on.set()
    with pytest.raises(DeadlineError, match=r"to finish within 0.2 s, it did not"):
        future.result(timeout=60)


def test_an_engine_that_fails_ends_the_requests_of_its_tick_and_no_others(bundle, open_batch, slow):
    batch = open_batch(slots=1, backend=slow)
    slow.error = EngineError("broken")
    first = batch.submit(**request(bundle, 0))
    slow.goes_on.set()
    with pytest.raises(EngineError, match="broken"):
        first.result(timeout=60)
    slow.error = None
    assert batch.submit(**request(bundle, 1), preset="uncached").result(timeout=60).steps == 3
    assert batch.counters().failed == 1


def test_close_drains_or_cancels(bundle, open_batch, slow):
    slow.goes_on.set()
    drained = open_batch(slots=1, backend=slow)
    futures = [drained.submit(**request(bundle, i)) for i in range(3)]
    drained.close()
    assert all(future.result(timeout=0) for future in futures)
    slow.goes_on.clear()
    dropped = open_batch(slots=1, backend=slow)
    futures = [dropped.submit(**request(bundle, i)) for i in range(3)]
    threading.Timer(0.05, slow.goes_on.set).start()
    dropped.close(drain=False)
    assert all(isinstance(future.exception(timeout=0), Cancelled) for future in futures)
    with pytest.raises(ConfigError, match="Expected an open batch, this one is closed"):
        dropped.submit(**request(bundle, 0))


def test_a_callback_cannot_close_the_batch(bundle, open_batch, slow):
    batch, caught = open_batch(backend=slow), []

    def close(_: BatchFuture) -> None:
        try:
            batch.close()
        except ConfigError as error:
            caught.append(str(error))

    batch.submit(**request(bundle, 0)).add_done_callback(close)
    slow.goes_on.set()
    batch.close()
    assert caught[0].startswith("close was called from a callback of a future")


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"noise": np.zeros((2, 4, 16, 16), np.float32)}, "noise: expected one image [1, C, H, W]"),
        ({"noise": np.zeros((1, 4, 16, 24), np.float32)}, "Expected a request of the batch's size"),
        ({"noise": np.full((1, 4, 16, 16), np.nan, np.float32)}, "noise: expected finite numbers"),
        ({"preset": "dpm-99"}, "preset: expected one that the batch was opened with, ['cached-dp"),
        ({"preset": "noisy", "seeds": None}, "seeds: expected 1 whole numbers"),
        ({"deadline": "soon"}, "deadline: expected one finite number"),
        ({"negative_prompt_embeds": None}, "negative encoder_hidden_states: expected a tensor"),
    ],
)
def test_what_is_wrong_with_a_request_is_said_at_once(bundle, open_batch, change, text):
    batch = open_batch(backend=EmptyBackend())
    seeds = [0] * len(change.get("noise", "1"))
    with pytest.raises(InputError) as caught:
        batch.submit(**{**request(bundle, 0), "seeds": seeds, **change})
    assert str(caught.value).startswith(text)
    assert batch.counters().submitted == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"slots": 0}, "slots: expected a whole number of 1 to"),
        ({"queue": 0}, "queue: expected a whole number of 1 or more"),
        ({"presets": []}, "presets: expected a list of names"),
        ({"height": 18}, "Expected a latent height and width divisible by 4, got 18 x 16"),
    ],
)
def test_options_are_checked_when_the_batch_opens(bundle, options, text):
    with pytest.raises(ConfigError) as caught:
        ContinuousBatch.open(bundle, **options)
    assert str(caught.value).startswith(text)


def test_a_gpu_is_refused(bundle, presets):
    backend = EmptyBackend()
    backend.device = object()
    with pytest.raises(ConfigError, match="Expected a backend on the CPU, got 'empty'"):
        ContinuousBatch(bundle, presets, backend, bundle.model.sizes, slots=1, queue=1)


def test_memory_is_known_when_the_batch_opens(bundle, open_batch):
    one, four = (open_batch(slots, backend=EmptyBackend()).memory for slots in (1, 4))
    assert 3.5 < (four.cached + four.requests) / (one.cached + one.requests) < 4.5
    assert one.tables == four.tables > 0
    assert four.total == sum(dataclasses.asdict(four).values())
    row = sum(
        spec.bytes(dataclasses.replace(bundle.model.sizes, batch=1))
        for spec in row_specs(bundle.model, bundle.segments)
    )
    assert one.tables == row * (6 + 4 + 5 + 3 + 1)
