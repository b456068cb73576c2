"""Options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer
from typer.core import TyperCommand, TyperGroup

from blockcache import __version__


def _flags_without_value(params: list[Any]) -> list[Any]:
    """Tell typer's help that a flag takes no value; by itself it prints ``--json <bool>``."""
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return params


class Command(TyperCommand):
    """A command whose help reads ``--json``, not ``--json <bool>``."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters as the help shows them."""
        return _flags_without_value(super().get_params(ctx))


class Group(TyperGroup):
    """The same for the command of commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters as the help shows them."""
        return _flags_without_value(super().get_params(ctx))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"blockcache {__version__}")
        raise typer.Exit


def every_command(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
        ),
    ] = False,
    log: Annotated[
        Path | None,
        typer.Option(
            help="Append the messages of other libraries to this file; default: not shown."
        ),
    ] = None,
) -> None:
    """Block Caching for diffusion U-Nets: compile a bundle, denoise by schedule."""
    from blockcache.tools.library_messages import diverted

    context.with_resource(diverted(log))


BundleFolder: TypeAlias = Annotated[
    Path, typer.Argument(help="A folder that 'blockcache compile' wrote.")
]
PresetName: TypeAlias = Annotated[
    str | None,
    typer.Option("--preset", help="A preset of the bundle; default the recommended one."),
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
