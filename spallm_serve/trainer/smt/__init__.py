"""Sparse Matrix Tuning: the blocks of the weights with the largest gradients are trained."""
