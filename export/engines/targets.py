"""Names of build targets: ``sm80``, ``a100``, ``current``, ``any``, several joined by ``+``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from blockcache.runtime.engines.tensorrt_library import dotted
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

ANY = "ANY"
"""Stands for every GPU that the library has: no capability is named to the builder."""


@dataclass(frozen=True)
class Target:
    """What engines are built for."""

    name: str  # the folder's name: "sm80", "sm80+sm89", "current", "any"
    capabilities: tuple[str, ...]  # "SM80", ..., or (CURRENT,) or (ANY,)

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read ``sm80``, ``a100``, ``current``, ``any`` or several such as ``sm80+sm89``.

        Examples:
            >>> Target.parse("a100+SM89")
            Target(name='sm80+sm89', capabilities=('SM80', 'SM89'))
        """
        parts = [part.strip().lower().replace("-", "") for part in re.split(r"[+,]", text)]
        found = []
        for part in parts:
            capability = GPUS.get(part, part.upper())
            if not re.fullmatch(r"SM[1-9][0-9]{1,2}|CURRENT|ANY", capability):
                raise ConfigError(
                    f"Expected a target such as sm80, current, any, several joined by '+', or a "
                    f"GPU of {sorted(GPUS)}; got {text!r}."
                )
            found.append(capability)
        for alone, what in ((CURRENT, "one GPU"), (ANY, "all GPUs of the library")):
            if alone in found and len(found) > 1:
                raise ConfigError(f"{alone.lower()!r} stands alone: it is {what}; got {text!r}.")
        unique = tuple(sorted(set(found), key=lambda name: (len(name), name)))
        return cls("+".join(name.lower() for name in unique), unique)

    @property
    def dotted(self) -> tuple[str, ...]:
        """Capabilities as the driver writes them: "8.0"; none for ``current`` and ``any``."""
        if self.capabilities in ((CURRENT,), (ANY,)):
            return ()
        return tuple(dotted(name) for name in self.capabilities)
