"""Checks where a command will write before it starts, so that hours of work are not lost."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path

from blockcache.runtime.errors import ConfigError, MissingExtraError

PICTURES = (".png", ".svg")
"""What plots can be, by suffix."""


def check_folder(folder: Path) -> None:
    """Make a folder and try to write into it.

    Raises:
        ConfigError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"Expected a folder that can be written at {folder}, got: {error.strerror}. Choose "
            f"another place for the output."
        ) from error


def check_file(file: Path, suffixes: tuple[str, ...] = ()) -> None:
    """Make the folder of an output file; ``suffixes`` are what the file may end in.

    Raises:
        ConfigError: another suffix, a folder of that name, or a folder that cannot be written.
    """
    if suffixes and file.suffix not in suffixes:
        raise ConfigError(f"Expected a file that ends in {' or '.join(suffixes)}, got {file}.")
    if file.is_dir():
        raise ConfigError(f"Expected a file at {file}, it is a folder. Choose another name.")
    check_folder(file.parent)


def check_picture(file: Path) -> None:
    """``check_file`` of a plot, and that plots can be drawn."""
    check_plots()
    check_file(file, PICTURES)


def check_plots() -> None:
    """Raise MissingExtraError where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise MissingExtraError.of("matplotlib", "export", "Plotting")
