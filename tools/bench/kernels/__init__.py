"""Each kernel timed against the operations that it replaces."""
