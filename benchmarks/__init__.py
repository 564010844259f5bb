"""Benchmarks: what the package costs (``speed``, ``gpu``) and what it brings."""
