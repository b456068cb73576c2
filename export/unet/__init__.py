"""The source model: loading a diffusers U-Net, and the PyTorch reference with reusable blocks."""
