"""Names of build targets: ``sm80``, ``a100``, ``current``, several joined by ``+``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from blockcache.runtime.errors import ConfigError

GPUS = {
    "t4": "SM75",
    "a100": "SM80",
    "a30": "SM80",
    "a10": "SM86",
    "a40": "SM86",
    "rtx3090": "SM86",
    "l4": "SM89",
    "l40": "SM89",
    "l40s": "SM89",
    "rtx4090": "SM89",
    "h100": "SM90",
    "h200": "SM90",
    "b200": "SM100",
    "rtx5090": "SM120",
}
"""GPUs that may be named in place of their compute capability."""

CURRENT = "CURRENT"
"""Stands for the device of the building machine."""


@dataclass(frozen=True)
class Target:
    """What engines are built for."""

    name: str  # the folder's name: "sm80", "sm80+sm89", "current"
    capabilities: tuple[str, ...]  # "SM80", ..., or (CURRENT,)

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read ``sm80``, ``a100``, ``current`` or several such as ``sm80+sm89``.

        Examples:
            >>> Target.parse("a100+SM89")
            Target(name='sm80+sm89', capabilities=('SM80', 'SM89'))
        """
        parts = [part.strip().lower().replace("-", "") for part in re.split(r"[+,]", text)]
        found = []
        for part in parts:
            capability = GPUS.get(part, part.upper())
            if not re.fullmatch(r"SM[1-9][0-9]{1,2}|CURRENT", capability):
                raise ConfigError(
                    f"Expected a target such as sm80, current, several joined by '+', or a GPU of "
                    f"{sorted(GPUS)}; got {text!r}."
                )
            found.append(capability)
        if CURRENT in found and len(found) > 1:
            raise ConfigError(f"'current' stands alone: it is one GPU; got {text!r}.")
        unique = tuple(sorted(set(found), key=lambda name: (len(name), name)))
        return cls("+".join(name.lower() for name in unique), unique)

    @property
    def dotted(self) -> tuple[str, ...]:
        """Capabilities as the driver writes them: "8.0"; none for ``current``."""
        if self.capabilities == (CURRENT,):
            return ()
        return tuple(f"{name[2:-1]}.{name[-1]}" for name in self.capabilities)
