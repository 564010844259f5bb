"""Tensors in, tensors out: ground costs, transport plans, and the distance between two sets of neurons."""
