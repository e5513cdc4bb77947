"""Fine-tuning: the loop, and one folder for each method."""
