"""Load a teacher: a module as it is, a model by its name or folder, or a checkpoint with its class."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from lightning_otrt.checks import shown
from lightning_otrt.teacher.loading.checkpoint import ENDINGS, from_checkpoint, imported
from lightning_otrt.teacher.loading.class_path import check_class_path
from lightning_otrt.teacher.loading.named import from_folder, from_timm, from_torchvision

__all__ = ["TeacherSource", "load_teacher", "wrong_form"]

#: What :func:`load_teacher` accepts; a list is a tuple written in YAML.
TeacherSource: TypeAlias = nn.Module | str | tuple[Any, Any] | list[Any] | os.PathLike[str]

_FORMS = (
    "an nn.Module (a LightningModule is one), the name of a model of torchvision ('resnet50', 'resnet50:IMAGENET1K_V2' "
    "or ('resnet50', 'IMAGENET1K_V2')) or of timm ('timm:resnet50'), a folder of Hugging Face, or a checkpoint with "
    "its class (('teacher.ckpt', MyModule) or ('teacher.ckpt', 'my_package.MyModule'))"
)
_TIMM = "timm:"


def load_teacher(
    source: TeacherSource,
    *,
    weights: Any = "DEFAULT",
    model_class: Callable[..., nn.Module] | str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """A teacher from a module, the name of a model, a folder of Hugging Face or a checkpoint.

    Args:
        source: An ``nn.Module``, returned as it is; a torchvision model, ``"name"`` or ``"name:WEIGHTS"``; a timm
            model, ``"timm:name"``, with its pretrained weights; a folder that ``save_pretrained`` of transformers
            wrote; the path of a checkpoint (an existing file, or a path that ends in ``.ckpt``, ``.pt``, ``.pth`` or
            ``.safetensors``); ``(name, weights)``; ``(path, class)``.
        weights: Weights of the torchvision model: their name, a member of its enum, or None for an untrained network.
            None is for timm models, too.
        model_class: Class of the network in the checkpoint or the folder, a function that builds it, or the import path
            of either. A LightningModule is loaded with its ``load_from_checkpoint``, a folder with ``from_pretrained``
            of the class (by default of ``transformers.AutoModel``). Any other network gets the state dict of the file,
            either the whole file or its entry ``"state_dict"``.
        **kwargs: Arguments of the named model, of ``load_from_checkpoint``, ``from_pretrained`` or of ``model_class``.

    Returns:
        The teacher. A loaded teacher is on the CPU.

    Raises:
        TypeError: If ``source`` has none of these forms, or an argument has no meaning for it.
        ValueError: If a model or its weights are unknown, or the weights in a file do not fit the class.
        FileNotFoundError: If there is no such checkpoint.
        ImportError: If the package of a named model, or ``model_class``, cannot be imported.
        RuntimeError: If a file cannot be read as tensors (``weights_only=True``), or weights cannot be downloaded.

    Example:
        >>> from torch import nn
        >>> load_teacher(nn.Linear(4, 2))
        Linear(in_features=4, out_features=2, bias=True)
        >>> load_teacher("resnet18", weights=None, num_classes=10).fc.out_features
        10
    """
    # Not by calls of itself: LightningCLI follows each call that passes `**kwargs` on, and would not return.
    if isinstance(source, (tuple, list)) and len(source) == 2 and isinstance(source[0], (str, os.PathLike)):
        source, second = source
        if _is_stored(source):
            model_class = second
        else:
            weights = second
    given_weights = None if weights == "DEFAULT" else weights
    if isinstance(source, str) and not _is_stored(source):
        check_class_path(source)
        _reject(source, model_class=model_class)
        if source.startswith(_TIMM):
            _reject(source, weights=given_weights)
            return from_timm(source.removeprefix(_TIMM), kwargs, pretrained=weights is not None)
        return from_torchvision(source, weights, kwargs, forms=_FORMS)
    _reject(source, weights="None" if weights is None else given_weights)
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        if isinstance(model_class, str):
            model_class = imported(model_class)
        return (from_folder if os.path.isdir(path) else from_checkpoint)(path, model_class, kwargs)
    if not isinstance(source, nn.Module):
        raise wrong_form(source)
    _reject(source, model_class=model_class, **kwargs)
    return source


def _is_stored(source: Any) -> bool:
    """Whether a source is a path rather than a name."""
    if not isinstance(source, str):
        return isinstance(source, os.PathLike)
    return source.endswith(ENDINGS) or os.path.isfile(source) or os.path.isfile(os.path.join(source, "config.json"))


def _reject(source: Any, **arguments: Any) -> None:
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        what = repr(source) if isinstance(source, (str, os.PathLike)) else type(source).__name__
        raise TypeError(f"{given} would have no effect on the teacher {what}; leave them out. A teacher is {_FORMS}.")


def wrong_form(source: Any) -> TypeError:
    """The error for an object that cannot be a teacher."""
    # With its module, since `lightning` and `pytorch_lightning` have types of the same names.
    kind = f"{type(source).__module__}.{type(source).__qualname__}"
    text = shown(source)
    got = f"{text} of type {kind}" if text == repr(source) else f"an object of type {kind}"
    if isinstance(source, type):
        got = f"the class {source.__name__} (pass an instance)"
    tensors = sum(isinstance(value, Tensor) for value in source.values()) if isinstance(source, Mapping) else 0
    if tensors:
        got = (
            f"a mapping of type {kind} with {tensors} tensors. It holds weights, not the network: build the network, "
            "load them with `load_state_dict`, and pass the network"
        )
    return TypeError(f"Expected `teacher` to be {_FORMS}, but got {got}.")
