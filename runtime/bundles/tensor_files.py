"""Safetensors files: tensors by name, and a preset's tables both ways.

::

    recompute        uint8 [S, K], 0 or 1: the schedule
    alignment.<k>    float32 [S, A, C_k]: coefficients of block k where it is reused
    time.<name>      float32 [S, ...]: hoisted time projections
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from blockcache.runtime.bundles.manifest import PresetEntry
from blockcache.runtime.errors import BundleFormatError, BundleIntegrityError, ConfigError
from blockcache.runtime.files import write_bytes
from blockcache.runtime.plan import Alignment, Preset, Schedule


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file atomically."""
    write_bytes(path, save({name: np.ascontiguousarray(v) for name, v in tensors.items()}))


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read a safetensors file; BundleIntegrityError where it is not one."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _not_tensors(str(path), error) from error
    return parse_tensors(content, str(path))


def parse_tensors(content: bytes, where: str) -> dict[str, np.ndarray]:
    """The tensors in the bytes of a safetensors file; BundleIntegrityError where it is none."""
    try:
        return load(content)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that numpy does not have
        raise _not_tensors(where, error) from error


def _not_tensors(where: str, error: Exception) -> BundleIntegrityError:
    return BundleIntegrityError(
        f"Expected a safetensors file at {where}, got: {error}. Compile again."
    )


def preset_bytes(preset: Preset) -> bytes:
    """A preset's tables as a safetensors file."""
    tensors = {"recompute": preset.schedule.recompute.astype(np.uint8)}
    tensors |= {f"alignment.{k}": table for k, table in enumerate(preset.alignment.tables)}
    tensors |= {f"time.{name}": table for name, table in preset.time_tables.items()}
    return save({name: np.ascontiguousarray(table) for name, table in tensors.items()})


def parse_preset(content: bytes, name: str, entry: PresetEntry) -> Preset:
    """A preset from the bytes of its tables.

    Raises:
        BundleIntegrityError: the bytes are no safetensors file.
        BundleFormatError: a table is missing, unknown, of another dtype or not finite, or tables
            do not fit together.
    """
    tensors = parse_tensors(content, entry.file)
    try:
        _check_numbers(tensors)
        schedule = Schedule(tensors.pop("recompute").astype(np.bool_))
        tables = tuple(tensors.pop(f"alignment.{k}") for k in range(schedule.blocks))
        return Preset(
            name=name,
            solver=entry.solver,
            schedule=schedule,
            alignment=Alignment(tables),
            time_tables={key.removeprefix("time."): table for key, table in tensors.items()},
            guidance_scale=entry.guidance_scale,
            provenance=entry.provenance,
        )
    except KeyError as error:
        raise _unfit(name, f"the table {error} is missing.") from error
    except ConfigError as error:
        raise _unfit(name, str(error)) from error


def _check_numbers(tensors: Mapping[str, np.ndarray]) -> None:
    """Every table is of its dtype, finite, and known by name."""
    for name, table in tensors.items():
        if name == "recompute":
            if table.dtype != np.uint8 or (table > 1).any():
                raise ConfigError(f"recompute: expected 0 and 1 as uint8, got {table.dtype}.")
        elif not name.startswith(("alignment.", "time.")):
            raise ConfigError(f"{name}: expected no table of this name.")
        elif table.dtype != np.float32 or table.ndim < 2:
            raise ConfigError(
                f"{name}: expected a float32 table with a row a step, got {table.dtype} "
                f"{list(table.shape)}."
            )
        elif not np.isfinite(table).all():
            bad = int(table.size - np.isfinite(table).sum())
            raise ConfigError(f"{name}: {bad} of {table.size} numbers are NaN or infinite.")


def _unfit(name: str, reason: str) -> BundleFormatError:
    return BundleFormatError(
        f"The tables of preset {name!r} do not fit together: {reason} Compile again."
    )
