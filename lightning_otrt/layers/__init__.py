"""Names of layers, the trace of a forward, and which layers are paired. Plain data: no modules, no tensors."""
