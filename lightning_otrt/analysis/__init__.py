"""Measurements: the metric, comparisons of layers, the choice of a weight, figures."""
