"""New weights on the stand-in GPU: engines of the first bundle are refitted, all or none."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from blockcache.runtime import ConfigError, EngineError, Session
from blockcache.runtime.engines.ort import OrtBackend
from blockcache.runtime.engines.trt import TrtBackend

pytestmark = pytest.mark.driver


def draw(session):
    model = session.bundle.model
    (prompt,) = model.conditions
    rng = np.random.default_rng(0)
    shape = prompt.shape(dataclasses.replace(model.sizes, batch=1))
    embeds, negative = (rng.standard_normal(shape, np.float32) for _ in range(2))
    return session.denoise(session.noise([0]), embeds, negative, guidance_scale=3.0).latents


@pytest.mark.parametrize("weights", ["refittable", "stripped"])
def test_engines_are_refitted_and_the_first_ones_stay(
    tensorrt, bundle_of, engines_for, reweighted, tmp_path, weights
):
    library, bundle = tensorrt(), bundle_of(1)
    engines_for(bundle, library, weights=weights)
    other = reweighted(bundle, tmp_path / "warm", 1.01)

    def on_cpu(each):
        return draw(Session(each, each.preset("ddim-4"), OrtBackend(threads=1)))

    session = Session(bundle, bundle.preset("ddim-4"), TrtBackend(graphs="check"))
    twin = Session(bundle, bundle.preset("ddim-4"), TrtBackend(graphs="check"))
    wanted, theirs = on_cpu(bundle), on_cpu(other)
    for _ in range(3):  # launch by launch, captured, replayed
        np.testing.assert_array_equal(draw(session), wanted)
    session.swap_weights(other, keep_bytes=bundle.weights.bytes)
    for _ in range(3):
        np.testing.assert_array_equal(draw(session), theirs)
    np.testing.assert_array_equal(draw(twin), wanted)  # engines are shared, weights are not
    session.swap_weights(name="base")
    np.testing.assert_array_equal(draw(session), wanted)
    session.close()
    twin.close()


def test_a_refit_that_fails_leaves_the_session_as_it_was(
    tensorrt, bundle_of, engines_for, reweighted, tmp_path
):
    library, bundle = tensorrt(), bundle_of(1)
    engines_for(bundle, library, weights="refittable")
    other = reweighted(bundle, tmp_path / "warm", 1.01)
    session = Session(bundle, bundle.preset("ddim-4"), TrtBackend())
    wanted, asked = draw(session), []
    refuse = library.refuse

    def refuse_third(function):
        asked.append(function)
        return asked.count("refit_from_file") > 2 and function == "refit_from_file"

    library.refuse = refuse_third
    with pytest.raises(EngineError, match="to fit the engine of segment"):
        session.swap_weights(other)
    library.refuse = refuse
    assert asked.count("refit_from_file") == 3
    assert (session.weights, session.bundle) == (("base",), bundle)
    np.testing.assert_array_equal(draw(session), wanted)
    session.close()


def test_engines_with_their_weights_for_good_are_refused(
    tensorrt, bundle_of, engines_for, reweighted, tmp_path
):
    library, bundle = tensorrt(), bundle_of(1)
    engines_for(bundle, library)
    other = reweighted(bundle, tmp_path / "warm", 1.01)
    session = Session(bundle, bundle.preset("ddim-4"), TrtBackend())
    with pytest.raises(ConfigError, match=r"built with theirs for good.*--weights refittable"):
        session.swap_weights(other)
    session.close()
