"""Graph passes over the exported U-Net, one a file, applied in the order align, hoist, split."""
