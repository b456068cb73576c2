"""The demo model: a small latent diffusion model that draws colour emoji, and its training."""
