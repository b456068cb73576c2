"""Engines held against ONNX Runtime in float32 on the CPU, segment by segment and as a loop."""
