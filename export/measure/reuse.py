"""The ways in which earlier outputs of a block can take the place of a computed one."""

from __future__ import annotations

REUSES = PLAIN, SCALE_SHIFT, HISTORY = "plain", "scale-shift", "history"
"""The last output as it is, that one scaled and shifted, or the last two combined."""
