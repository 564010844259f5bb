"""Which tokens are padding: the masks of a layer, and padding that no mask names."""
