"""blockcache.export: the offline stages, from a diffusers U-Net to a bundle."""
