"""Runnable examples: ``python -m examples.compression`` and its siblings."""
