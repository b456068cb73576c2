"""What a segment costs: counted, measured on a device, or predicted for a GPU."""
