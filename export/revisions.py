"""Revisions: which code of ours has made a stage's result.

A stage's result is kept and reused (``stages.py``, ``engines/cache.py``), so a change of our code
must not find what the code before has made. Each stage has a number that is part of its key, beside
the hash of the sources that it runs. A test fails when the sources change and this table does not.
Then the developer says which it is:

    python -m blockcache.tools.dev.revisions --bump STAGE       the results change: made anew
    python -m blockcache.tools.dev.revisions --confirm STAGE    they are the same: still reused
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_MODEL = (
    "export/unet/control.py",
    "export/unet/extra_inputs.py",
    "export/unet/lora.py",
    "export/unet/model.py",
    "export/unet/precision.py",
)
_SAMPLING = (
    *_MODEL,
    "export/measure/calibration.py",
    "export/measure/encoded_prompts.py",
    "export/measure/sampling.py",
    "export/unet/cached_unet.py",
    "export/unet/scheduler.py",
    "export/unet/steps.py",
    "export/unet/torch_kernels.py",
    "runtime/solvers/diffusers_config.py",
    "runtime/solvers/grid.py",
    "runtime/solvers/noise.py",
    "runtime/solvers/philox.py",
    "runtime/solvers/recorded.py",
    "runtime/solvers/solver.py",
)
"""What every measurement runs."""


@dataclass(frozen=True)
class Revision:
    """A stage's revision."""

    number: int  # part of the stage's key
    sha256: str  # of the sources, without comments, docstrings and layout; its first 16 digits
    sources: tuple[str, ...]  # path patterns inside the package, of all that the result depends on


REVISIONS: Mapping[str, Revision] = {
    "export": Revision(
        5,
        "8d61826b6a0564a7",
        (
            *_MODEL,
            "export/graph/passes/*.py",
            "export/graph/to_onnx.py",
            "export/graph/work.py",
        ),
    ),
    "parts": Revision(
        2,
        "47c1bdd84f6fc615",
        (
            "export/unet/lora.py",
            "export/unet/weights.py",
            "export/graph/passes/canonical.py",
            "export/parts/*.py",
        ),
    ),
    "profile": Revision(2, "9bc1241e90b08c03", (*_SAMPLING, "export/measure/change.py")),
    "converged": Revision(
        5,
        "f88d20584c5d3e04",
        (*_SAMPLING, "export/measure/converged.py", "export/measure/residuals.py"),
    ),
    "sensitivity": Revision(2, "f8ad93bea515cd2c", (*_SAMPLING, "export/measure/sensitivity.py")),
    "residuals": Revision(
        2,
        "b228b772d339e6e1",
        (*_SAMPLING, "export/measure/residuals.py", "export/measure/reuse.py"),
    ),
    "alignment": Revision(3, "2caa31024dcd341d", (*_SAMPLING, "export/align/*.py")),
    "trial": Revision(4, "2caa31024dcd341d", (*_SAMPLING, "export/align/*.py")),
    "yardstick": Revision(
        2,
        "f88d20584c5d3e04",
        (*_SAMPLING, "export/measure/converged.py", "export/measure/residuals.py"),
    ),
    "pictures": Revision(
        1,
        "07933893e0f63fd9",
        (*_SAMPLING, "export/measure/own_pictures.py", "export/parts/autoencoders.py"),
    ),
    "engine": Revision(
        1,
        "32e1bb99bb3cd719",
        (
            "export/engines/bfloat16_resize.py",
            "export/engines/build.py",
            "export/engines/engine.py",
            "export/engines/targets.py",
        ),
    ),
}
"""By stage."""
