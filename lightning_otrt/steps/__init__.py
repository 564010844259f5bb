"""A training run: when plans are solved, and from which sums."""
