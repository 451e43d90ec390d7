"""Random streams, PyTorch's modes, and statistics of activations."""
