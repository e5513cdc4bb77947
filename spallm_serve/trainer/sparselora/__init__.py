"""SparseLoRA: LoRA whose base branch computes few channels for context tokens."""
