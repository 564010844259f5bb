"""From the forward of a network to matrices of neurons."""
