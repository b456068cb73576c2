"""Segments to TensorRT engines: building, caching, reports, and what engines are checked by."""
