"""``python -m examples.cli fit --config examples/cli/torchvision.yaml``, or timm.yaml, or hugging_face.yaml."""

from __future__ import annotations

from lightning.pytorch.cli import LightningCLI


def main() -> None:
    """LightningCLI as it is: everything about the transfer is in the YAML."""
    LightningCLI(subclass_mode_model=True, subclass_mode_data=True)


if __name__ == "__main__":
    main()
