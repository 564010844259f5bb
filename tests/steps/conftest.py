"""Fixtures of the steps floor."""

from recorded_graph import use_recorded_graphs

__all__ = ["use_recorded_graphs"]
