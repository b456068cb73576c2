"""What runs the uncached U-Net on calibration prompts: change, sensitivity, residuals."""
