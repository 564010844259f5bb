"""Real checkpoints on real data, both from packages: nothing is downloaded from a hub, nothing is redistributed."""
