"""Quality and speed of a bundle's presets in one table: the paper's Table 1 for one's own model."""
