"""Where tensors live: host and CUDA memory, streams, graphs, and tensors of other libraries."""
