"""Training from YAML: ``python -m examples.cli fit --config examples/cli/torchvision.yaml``."""
