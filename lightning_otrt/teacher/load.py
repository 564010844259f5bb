"""Load a teacher: a module as it is, a torchvision model by name, or a checkpoint, which is read without unpickling."""

from __future__ import annotations

import difflib
import os
import pickle
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

__all__ = ["TeacherSource", "load_teacher", "wrong_form"]

#: What :func:`load_teacher` accepts; a list is a tuple written in YAML.
TeacherSource: TypeAlias = nn.Module | str | tuple[Any, Any] | list[Any] | os.PathLike[str]

_FORMS = (
    "an nn.Module (a LightningModule is one), the name of a torchvision model ('resnet50', 'resnet50:IMAGENET1K_V2' or "
    "('resnet50', 'IMAGENET1K_V2')), or a checkpoint with its class (('teacher.ckpt', MyModule))"
)


def load_teacher(
    source: TeacherSource,
    *,
    weights: Any = "DEFAULT",
    model_class: Callable[..., nn.Module] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """A teacher from a module, the name of a torchvision model or a checkpoint.

    Args:
        source: An ``nn.Module``, returned as it is; a torchvision model, ``"name"`` or ``"name:WEIGHTS"``; the path of
            a checkpoint (an existing file, or a path that ends in ``.ckpt``, ``.pt`` or ``.pth``); ``(name, weights)``;
            ``(path, class)``.
        weights: Weights of the torchvision model: their name, a member of its enum, or None for an untrained network.
        model_class: Class of the network in the checkpoint, or a function that builds it. A LightningModule is loaded
            with its ``load_from_checkpoint``. Any other network gets the state dict of the file, either the whole file
            or its entry ``"state_dict"``.
        **kwargs: Arguments of the torchvision model, of ``load_from_checkpoint`` or of ``model_class``.

    Returns:
        The teacher. A loaded teacher is on the CPU.

    Raises:
        TypeError: If ``source`` has none of these forms, or an argument has no meaning for it.
        ValueError: If a model or its weights are unknown, or the weights in a file do not fit the class.
        FileNotFoundError: If there is no such checkpoint.
        RuntimeError: If a file cannot be read as tensors (``weights_only=True``).

    Example:
        >>> from torch import nn
        >>> load_teacher(nn.Linear(4, 2))
        Linear(in_features=4, out_features=2, bias=True)
        >>> load_teacher("resnet18", weights=None, num_classes=10).fc.out_features
        10
    """
    if isinstance(source, (tuple, list)) and len(source) == 2 and isinstance(source[0], (str, os.PathLike)):
        source, second = source
        if _is_checkpoint(source):
            return load_teacher(source, weights=weights, model_class=second, **kwargs)
        return load_teacher(source, weights=second, model_class=model_class, **kwargs)
    if isinstance(source, str) and not _is_checkpoint(source):
        _reject(source, model_class=model_class)
        return _from_torchvision(source, weights, kwargs)
    _reject(source, weights=None if weights == "DEFAULT" else weights)
    if isinstance(source, (str, os.PathLike)):
        return _from_checkpoint(os.fspath(source), model_class, kwargs)
    if not isinstance(source, nn.Module):
        raise wrong_form(source)
    _reject(source, model_class=model_class, **kwargs)
    return source


def _is_checkpoint(source: Any) -> bool:
    if not isinstance(source, str):
        return isinstance(source, os.PathLike)
    return source.endswith((".ckpt", ".pt", ".pth")) or os.path.isfile(source)


def _reject(source: Any, **arguments: Any) -> None:
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        what = repr(source) if isinstance(source, (str, os.PathLike)) else type(source).__name__
        raise TypeError(f"{given} would have no effect on the teacher {what}; leave them out. A teacher is {_FORMS}.")


def wrong_form(source: Any) -> TypeError:
    """The error for an object that cannot be a teacher."""
    # With its module, since `lightning` and `pytorch_lightning` have types of the same names.
    got = f"{source!r} of type {type(source).__module__}.{type(source).__qualname__}"
    if isinstance(source, type):
        got = f"the class {source.__name__} (pass an instance)"
    return TypeError(f"Expected `teacher` to be {_FORMS}, but got {got}.")


def _from_torchvision(source: str, weights: Any, kwargs: Mapping[str, Any]) -> nn.Module:
    name, colon, suffix = source.partition(":")
    if colon:
        _reject(source, weights=None if weights == "DEFAULT" else weights)
        weights = None if suffix == "None" else suffix
    try:
        from torchvision import models
    except ImportError as error:
        raise ImportError(f"The teacher {source!r} needs torchvision: `pip install torchvision`.") from error
    known = models.list_models()
    if name.lower() not in known:
        close = difflib.get_close_matches(name.lower(), known, n=3)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"No torchvision model and no file is called {name!r}.{hint} A teacher is {_FORMS}.")
    choices = list(models.get_model_weights(name).__members__)
    if isinstance(weights, str) and weights.rpartition(".")[2] not in choices:
        raise ValueError(
            f"{name!r} has no weights {weights!r}. Choose from {choices}, or None for an untrained network."
        )
    model: nn.Module = models.get_model(name, weights=weights, **kwargs)
    return model


def _from_checkpoint(path: str, model_class: Any, kwargs: Mapping[str, Any]) -> nn.Module:
    if not callable(model_class) or isinstance(model_class, nn.Module):
        got = type(model_class).__name__ if isinstance(model_class, nn.Module) else repr(model_class)
        raise TypeError(
            f"The checkpoint {path!r} holds weights, not the network: expected its class as `model_class`, but got "
            f"{got}. Pass load_teacher({path!r}, model_class=MyModule), or ({path!r}, MyModule) as the teacher."
        )
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no checkpoint file {os.path.abspath(path)!r} to load the teacher from.")
    try:
        if hasattr(model_class, "load_from_checkpoint"):
            module: nn.Module = model_class.load_from_checkpoint(path, **{"map_location": "cpu", **kwargs})
            return module
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, KeyError) as error:
        reason = str(error).partition("WeightsUnpickler error: ")[2].partition(". ")[0] or repr(error)
        raise RuntimeError(
            f"The checkpoint {path!r} could not be read ({reason}). Either it is damaged or of another kind, or it "
            "holds more than tensors and plain values, and loading those can run any code. If you trust the file, load "
            "the teacher with `weights_only=False` (torch.load or load_from_checkpoint) and pass the module."
        ) from error
    module = model_class(**kwargs)
    _load_state(module, state, f"The weights in {path!r} do not fit {type(module).__name__}")
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
    if missing or unexpected:
        prefix = next((key.removesuffix(missing[0]) for key in unexpected if missing and key.endswith(missing[0])), "")
        hint = (
            f" The names in the file begin with {prefix!r}: pass the class that holds this network, such as the "
            "LightningModule that was saved, or take the prefix off."
        )
        raise ValueError(
            f"{complaint}. Missing: {_first(missing)}. Unexpected: {_first(unexpected)}.{hint if prefix else ''}"
        )


def _first(keys: list[str]) -> str:
    shown = ", ".join(map(repr, keys[:5])) or "none"
    return f"{shown} and {len(keys) - 5} more" if len(keys) > 5 else shown
