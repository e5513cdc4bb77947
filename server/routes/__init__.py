"""Routes of ours beside the engine's own."""
