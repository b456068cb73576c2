"""Where models, prompts and pictures come from: the demo model by name, diffusers by folder."""
