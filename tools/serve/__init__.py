"""Services on servers that exist: Ray Serve, NVIDIA Triton."""
