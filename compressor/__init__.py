"""Second floor: compress a model to codes and tables."""
