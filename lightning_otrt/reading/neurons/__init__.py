"""From the output of a layer to its neurons."""
