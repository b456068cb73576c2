"""How bundles are served behind Ray: options by name, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import PurePath
from typing import Any

from blockcache.runtime import ConfigError
from blockcache.runtime.arguments import whole_number

HEALTH = "healthz"
"""The path that tells how it is; no bundle can have this name."""

_LEAST = dict.fromkeys(("slots", "queue", "replicas", "ingresses", "open_bundles", "cpus"), 1)


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How bundles are served; what ``build`` takes by name."""

    bundle: str  # a folder, or several by commas, each as FOLDER or NAME=FOLDER
    slots: int = 8  # of a bundle in a replica
    queue: int = 32  # requests that wait at a replica, beyond its slots
    presets: str = ""  # by commas, the default first; "" takes all
    height: int = 0  # in pixels; 0 is the model's
    width: int = 0
    replicas: int = 1
    most_replicas: int = 0  # more than replicas: as many as the queue asks for, up to these
    ingresses: int = 1  # processes that speak HTTP with clients and send to replicas
    open_bundles: int = 3  # in a replica at a time; the one used longest ago is closed
    cpus: int = 1  # of a replica, and threads of its engines
    drain_seconds: int = 60  # what runs may take so long to end when a replica stops

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.type == "int":
                value = getattr(self, each.name)
                whole_number(each.name, value, _LEAST.get(each.name, 0), error=ConfigError)
        _ = self.bundles  # checked

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> ServeOptions:
        """From a command line or a config file: whole numbers may be texts.

        Raises:
            ConfigError: an unknown name, no bundle, or a value that is no whole number.
        """
        known = {each.name: each.type for each in fields(cls)}
        unknown = sorted(given.keys() - known.keys())
        if unknown or "bundle" not in given:
            got = f"{unknown[0]!r}" if unknown else "no bundle"
            raise ConfigError(f"Expected bundle=FOLDER and any of {list(known)}, got {got}.")
        read: dict[str, Any] = {
            name: _number(name, value) if known[name] == "int" else str(value)
            for name, value in given.items()
        }
        return cls(**read)

    @property
    def bundles(self) -> dict[str, str]:
        """Folders by name, the default first; without a name the folder's own.

        Raises:
            ConfigError: two of one name, or one without a name or a folder.
        """
        found: dict[str, str] = {}
        for text in self.bundle.split(","):
            given, _, folder = text.strip().rpartition("=")
            name = given or PurePath(folder).name
            if not name or not folder or "/" in name or name in (*found, HEALTH):
                raise ConfigError(
                    f"bundle: expected folders by commas, each FOLDER or NAME=FOLDER with a name "
                    f"of its own, got {self.bundle!r}."
                )
            found[name] = folder
        return found

    @property
    def most(self) -> int:
        """Replicas there may be."""
        return max(self.replicas, self.most_replicas)


def _number(name: str, value: object) -> int:
    try:
        return int(str(value))
    except ValueError as error:
        raise ConfigError(f"{name}: expected a whole number, got {str(value)[:80]!r}.") from error
