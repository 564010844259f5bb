"""Teachers from a file of weights, which is read without unpickling, and their class."""

from __future__ import annotations

import importlib
import os
import pickle
import struct
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from lightning_otrt.checks import shown
from lightning_otrt.layers.names import listed

__all__ = ["ENDINGS", "from_checkpoint", "imported"]

#: Endings of a file of weights.
ENDINGS = (".ckpt", ".pt", ".pth", ".safetensors")
#: Entries of files that hold no weights: counters, and constants that networks make themselves.
_HARMLESS = {
    "num_batches_tracked", "position_ids", "relative_position_index", "attn_mask", "inv_freq", "total_ops",
    "total_params",
}  # fmt: skip
#: An entry of all checkpoints of Lightning. Weights alone, as of `torch.save(module.state_dict(), path)`, lack it.
_VERSION = "pytorch-lightning_version"


def imported(path: str) -> Any:
    """A class or function by its import path.

    Raises:
        ImportError: If there is none.

    Example:
        >>> imported("torch.nn.Linear")
        <class 'torch.nn.modules.linear.Linear'>
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ImportError(
            f"Expected `model_class` to be a class or its import path, such as 'my_package.models.MyModule', but "
            f"{path!r} cannot be imported: {error}."
        ) from error


def from_checkpoint(path: str, model_class: Any, kwargs: Mapping[str, Any]) -> nn.Module:
    """The network of a class with the weights of a file. See :func:`~lightning_otrt.load_teacher` for the errors."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no checkpoint file {os.path.abspath(path)!r} to load the teacher from.")
    if not callable(model_class) or isinstance(model_class, nn.Module):
        got = type(model_class).__name__ if isinstance(model_class, nn.Module) else shown(model_class)
        raise TypeError(
            f"Of the checkpoint {path!r} only the weights are read: expected the class of the network as "
            f"`model_class`, but got {got}. Pass load_teacher({path!r}, model_class=MyModule), or ({path!r}, MyModule) "
            "as the teacher. If the file holds the whole network, as of torch.save(network, path), and you trust it, "
            f"pass torch.load({path!r}, weights_only=False)."
        )
    try:
        if hasattr(model_class, "load_from_checkpoint"):
            try:
                module: nn.Module = model_class.load_from_checkpoint(path, **{"map_location": "cpu", **kwargs})
                return module
            except KeyError as error:
                if _VERSION not in error.args:
                    raise
        state = load_file(path) if path.endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, KeyError, SafetensorError, struct.error) as error:
        reason = str(error).partition("WeightsUnpickler error: ")[2].partition(". ")[0] or repr(error)
        raise RuntimeError(
            f"The checkpoint {path!r} could not be read ({reason}). Either it is damaged or of another kind, or it "
            "holds more than tensors and plain values, and loading those can run any code. If you trust the file, load "
            "the teacher with `weights_only=False` (torch.load or load_from_checkpoint) and pass the module."
        ) from error
    module = _built(model_class, kwargs, path)
    _load_state(module, state, f"The weights in {path!r} do not fit {type(module).__name__}")
    return module


def _built(model_class: Any, kwargs: Mapping[str, Any], path: str) -> nn.Module:
    try:
        module: nn.Module = model_class(**kwargs)
    except TypeError as error:
        name = getattr(model_class, "__name__", str(model_class))
        raise TypeError(
            f"The network for the weights in {path!r} could not be built by {name}: {error}. The file holds no "
            f"arguments. Pass them, as in load_teacher({path!r}, model_class={name}, width=64), or a function "
            "without arguments that builds the network."
        ) from error
    return module


def _load_state(module: nn.Module, state: Any, complaint: str) -> None:
    if isinstance(state, Mapping):
        state = state.get("state_dict", state)
    if not isinstance(state, Mapping):
        raise ValueError(
            f"{complaint}: expected a state dict, alone or as 'state_dict', but got {type(state).__name__}."
        )
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except RuntimeError as error:  # shapes differ
        raise ValueError(f"{complaint}: {error}") from error
    unexpected = [key for key in unexpected if key.rpartition(".")[2] not in _HARMLESS]
    if missing or unexpected:
        prefix = next((key.removesuffix(missing[0]) for key in unexpected if missing and key.endswith(missing[0])), "")
        hint = (
            f" The names in the file begin with {prefix!r}: pass the class that holds this network, such as the "
            "LightningModule that was saved, or take the prefix off."
        )
        raise ValueError(
            f"{complaint}. Missing: {listed(missing, 5)}. Unexpected: {listed(unexpected, 5)}.{hint if prefix else ''}"
        )
