"""ONNX Runtime, imported with its telemetry switched off: the only door to it.

On Linux, ``import onnxruntime`` 1.32 opens a database of usage events under the user's cache folder
(``~/.cache/Microsoft/DeveloperTools``), writes a device id beside it and may send what it gathers
to Microsoft. It reads the environment variable ``ORT_DISABLE_TELEMETRY`` while it is imported, so
that is set here before the import, unless the user has set it; then nothing is opened, written or
looked up. ``disable_telemetry_events`` alone comes too late for the database.

What cannot be done from here: where another part of the process has imported onnxruntime first, the
database exists already, and only further events are stopped. A service that imports onnxruntime
itself should set ``ORT_DISABLE_TELEMETRY=1`` in its own environment.
"""

from __future__ import annotations

import os
from typing import Any

SWITCH = "ORT_DISABLE_TELEMETRY"

os.environ.setdefault(SWITCH, "1")
try:
    import onnxruntime
except ImportError:  # reported when a backend is made: importing this file stays free
    onnxruntime = None

ort: Any = onnxruntime
"""The module ``onnxruntime``; None where it is not installed."""

if ort is not None and os.environ[SWITCH] == "1":
    ort.disable_telemetry_events()
