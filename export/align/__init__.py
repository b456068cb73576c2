"""The alignment of reused outputs (paper, section 3.4): fitted in closed form, or distilled."""
