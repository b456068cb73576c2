"""New weights in a running session: all segments or none, never a mixture, and back bit for bit."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockcache.runtime import ConfigError, EmptyBackend, EngineError, Session
from blockcache.runtime.engines.ort import OrtBackend
from blockcache.runtime.weights import to_keep

TOKENS, WIDTH = 7, 32


@pytest.fixture(scope="module")
def plain(compiled):
    return compiled("sd")[1]


@pytest.fixture(scope="module")
def others(plain, reweighted, tmp_path_factory):
    """Two bundles of other weights, by name."""
    folder = tmp_path_factory.mktemp("weights")
    return {
        name: reweighted(plain, folder / name, factor)
        for name, factor in (("warm", 1.01), ("cold", 0.98))
    }


@pytest.fixture
def session(plain):
    with Session.open(plain, preset="ddim-4", backend="ort", threads=1) as opened:
        yield opened


def draw(session, images=1):
    rng = np.random.default_rng(3)
    prompt, negative = rng.standard_normal((2, 1, TOKENS, WIDTH)).astype(np.float32)
    noise = session.noise(range(images), 8, 8)
    return session.denoise(noise, prompt, negative, guidance_scale=3.0).latents


def reference(bundle):
    with Session.open(bundle, preset="ddim-4", backend="ort", threads=1) as opened:
        return draw(opened)


def test_the_picture_is_that_of_the_new_weights_and_back_bit_for_bit(session, plain, others):
    before = draw(session)
    assert session.weights == ("base",)
    assert session.swap_weights(others["warm"]) == "warm"
    assert session.bundle is others["warm"]
    assert session.weights == ("warm",)
    np.testing.assert_array_equal(draw(session), reference(others["warm"]))
    assert not np.array_equal(draw(session), before)
    session.swap_weights(others["cold"].folder, "winter")
    np.testing.assert_array_equal(draw(session), reference(others["cold"]))
    session.swap_weights(name="base")  # let go meanwhile, and loaded again
    np.testing.assert_array_equal(draw(session), before)
    assert session.bundle is plain


def test_sets_stay_loaded_within_the_limit(session, others):
    loads = []
    original = session.backend.load
    session.backend.load = lambda *a: loads.append(a) or original(*a)
    size = session.bundle.weights.bytes
    session.load_weights(others["warm"])
    assert (session.weights, session.bundle) == (("warm", "base"), session._base.bundle)
    session.swap_weights(name="warm", keep_bytes=size)
    session.swap_weights(others["cold"], keep_bytes=2 * size)
    count = len(loads)
    for name in ("base", "warm", "cold", "base"):
        session.swap_weights(name=name, keep_bytes=2 * size)
    assert len(loads) == count
    assert session.weights == ("warm", "cold", "base")
    session.swap_weights(name="warm", keep_bytes=size)
    assert session.weights == ("base", "warm")
    with pytest.raises(ConfigError, match=r"a name of \['base', 'warm'\], got 'cold'"):
        session.swap_weights(name="cold")


@given(
    sizes=st.lists(st.integers(0, 10), min_size=1, max_size=6),
    limit=st.integers(0, 30),
    data=st.data(),
)
def test_the_last_used_stay(sizes, limit, data):
    class Sized:
        def __init__(self, count):
            self.bytes = count

    sets = {str(i): Sized(count) for i, count in enumerate(sizes)}
    active = data.draw(st.sampled_from(sorted(sets)))
    kept = to_keep(sets, active, limit)
    beside = [name for name in sets if name in kept and name != active]
    assert active in kept
    assert sum(sets[name].bytes for name in beside) <= limit
    order = [name for name in sets if name != active]
    assert beside == order[len(order) - len(beside) :]
    if len(beside) < len(order):  # one more would be too much
        more = order[len(order) - len(beside) - 1]
        assert sum(sets[name].bytes for name in [*beside, more]) > limit


def test_every_picture_is_of_one_set_under_threads(session, others):
    wanted = [draw(session), *(reference(each) for each in others.values())]
    drawn, stop, errors = [], threading.Event(), []

    def ask():
        try:
            while not stop.is_set():
                drawn.append(draw(session))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for name in ("warm", "cold", "base") * 2:
        count = len(drawn)
        if name == "base":
            session.swap_weights(name=name)
        else:
            session.swap_weights(others[name])
        while len(drawn) < count + 3 and not errors:
            stop.wait(0.01)
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    of = [[np.array_equal(latents, each) for each in wanted].index(True) for latents in drawn]
    assert set(of) == {0, 1, 2}
    np.testing.assert_array_equal(draw(session), wanted[0])


def test_an_open_request_ends_on_the_weights_that_it_began_with(session, others):
    rng = np.random.default_rng(0)
    prompt = rng.standard_normal((1, TOKENS, WIDTH)).astype(np.float32)
    latents = session.noise([0], 8, 8)

    def outputs(swap):
        with session.begin(prompt, height=8, width=8) as request:
            first = request.predict(0, latents)
            if swap:
                session.swap_weights(others["warm"])
            return [first, *(request.predict(step, latents) for step in (1, 2, 3))]

    for one, other in zip(outputs(False), outputs(True), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(outputs(False)[0], one)


class Failing(EmptyBackend):
    """Engines that do nothing; loading one of them fails when it is told to."""

    def __init__(self):
        super().__init__()
        self.fails, self.loaded = "", []

    def load(self, bundle, segment):
        if segment.name == self.fails:
            raise EngineError(f"{segment.name} was told to fail")
        engine = super().load(bundle, segment)
        self.loaded.append(weakref.ref(engine))
        return engine

    def alive(self):
        gc.collect()
        return sum(engine() is not None for engine in self.loaded)


def test_nothing_changes_where_one_segment_fails(plain, others):
    backend = Failing()
    with Session.open(plain, preset="ddim-4", backend=backend) as session:
        before, engines = backend.alive(), dict(session._engines)
        backend.fails = session.bundle.segments[-2].name
        with pytest.raises(EngineError, match="was told to fail"):
            session.swap_weights(others["warm"])
        assert (session.bundle, session.weights) == (plain, ("base",))
        assert session._engines == engines
        del engines
        assert backend.alive() == before


def test_swaps_leave_nothing_behind(plain, others):
    backend = Failing()
    with Session.open(plain, preset="ddim-4", backend=backend) as session:
        draw(session)
        before = backend.alive()
        for _ in range(10):
            for name in ("warm", "cold"):
                session.swap_weights(others[name])
                draw(session)
        session.swap_weights(name="base")
        assert backend.alive() == before
        assert session.weights == ("base",)
    assert backend.alive() == 0


def with_manifest(bundle, **changes):
    return dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, **changes))


def test_only_weights_may_differ(session, plain, others):
    fewer = dataclasses.replace(plain.model, blocks=plain.model.blocks[1:])
    with pytest.raises(ConfigError, match=r"same U-Net with other weights.*other blocks.*--like"):
        session.swap_weights(with_manifest(plain, model=fewer), "x")
    changed = dataclasses.replace(plain.preset("ddim-4"), guidance_scale=1.5)
    other = dataclasses.replace(others["warm"], presets={**plain.presets, "ddim-4": changed})
    with pytest.raises(ConfigError, match=r"Expected the preset 'ddim-4'.*has another schedule"):
        session.swap_weights(other)
    with pytest.raises(ConfigError, match=r"has presets \['dpm-20'\]"):
        session.swap_weights(
            dataclasses.replace(plain, presets={"dpm-20": plain.preset("dpm-20")}), "x"
        )
    files = dict(plain.manifest.files)
    first = plain.segments[0]
    files[first.file] = dataclasses.replace(files[first.file], sha256="0" * 64)
    with pytest.raises(ConfigError, match=rf"segment '{first.name}' of .* has another graph"):
        session.swap_weights(with_manifest(plain, files=files), "x")
    with pytest.raises(ConfigError, match=r"Expected another name than 'base'"):
        session.swap_weights(others["warm"], "base")
    with pytest.raises(ConfigError, match=r"Expected a bundle, or a name of"):
        session.swap_weights()


def test_a_callback_cannot_swap_its_own_weights(session, others):
    rng = np.random.default_rng(0)
    prompt = rng.standard_normal((1, TOKENS, WIDTH)).astype(np.float32)
    with pytest.raises(ConfigError, match="called from a callback of the same session"):
        session.denoise(
            session.noise([0], 8, 8),
            prompt,
            prompt,
            callback=lambda _: session.swap_weights(others["warm"]),
        )
    assert session.bundle is session._base.bundle


def test_a_closed_session_takes_no_weights(plain, others):
    session = Session.open(plain, preset="ddim-4", backend=OrtBackend(threads=1))
    session.close()
    with pytest.raises(ConfigError, match="this one is closed"):
        session.swap_weights(others["warm"])
