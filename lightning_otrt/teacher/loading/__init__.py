"""Modules, names of models, folders and checkpoints as teachers."""
