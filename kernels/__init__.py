"""Ground floor: plain tensors in, plain tensors out; imports nothing else of the project."""
