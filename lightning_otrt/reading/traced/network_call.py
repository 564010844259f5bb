"""What of a network runs, and on which inputs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_otrt.layers.names import named_layers
from lightning_otrt.reading.traced.arguments import Inputs

__all__ = ["NetworkCall"]


@dataclass(frozen=True)
class NetworkCall:
    """A call of a module of a network.

    Args:
        model: The whole network.
        inputs: Arguments of the module that is called.
        root: Name of that module, ``""`` for the whole network.
        method: Name of its method that is called in place of its forward, ``""`` for the forward.
    """

    model: nn.Module
    inputs: Inputs
    root: str = ""
    method: str = ""

    @property
    def module(self) -> nn.Module:
        """The module that is called."""
        return named_layers(self.model)[self.root]
