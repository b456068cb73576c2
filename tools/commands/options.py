"""Options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

BundleFolder: TypeAlias = Annotated[
    Path, typer.Argument(help="A folder that 'blockcache compile' wrote.")
]
PresetName: TypeAlias = Annotated[
    str | None, typer.Option("--preset", help="A preset of the bundle; default the first cached.")
]
ModelName: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Where text encoder and VAE come from: 'demo' or a diffusers folder. Default 'demo' "
        "for a bundle of the demo model.",
    ),
]
BackendName: TypeAlias = Annotated[
    str,
    typer.Option(
        "--backend", help="Engine library: auto, trt, ort, ort-cuda, ort-tensorrt or empty."
    ),
]
Threads: TypeAlias = Annotated[
    int | None, typer.Option("--threads", help="CPU threads of the engine library.")
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]
