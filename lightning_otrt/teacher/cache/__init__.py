"""What a teacher gives for each sample, kept by a hash of the sample."""
