"""A part of the batch is changed or moved, and the network runs again: what it changes shows what belongs together."""
