"""What one forward shows of tensors and modules: arguments, samples, tokens, and axes of neurons."""
