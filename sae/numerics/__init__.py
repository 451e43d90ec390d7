"""What a computation depends on besides its inputs: random streams, and PyTorch's modes."""
