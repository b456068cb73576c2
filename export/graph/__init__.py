"""One ONNX graph of the U-Net, the passes over it, and the segments it is cut into."""
