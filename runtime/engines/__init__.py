"""Engine libraries behind one protocol: ONNX Runtime, its CUDA provider, TensorRT."""
