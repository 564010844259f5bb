"""Teachers that other packages name: models of torchvision and timm, folders of Hugging Face."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any
from urllib.error import URLError

from torch import nn

from lightning_otrt.layers.names import listed
from lightning_otrt.notices import warn

__all__ = ["from_folder", "from_timm", "from_torchvision"]


def from_torchvision(source: str, weights: Any, kwargs: Mapping[str, Any], *, forms: str) -> nn.Module:
    """A model of torchvision, ``"name"`` or ``"name:WEIGHTS"``; ``forms`` says in errors what else a teacher may be."""
    name, colon, suffix = source.partition(":")
    if colon:
        if weights not in (None, "DEFAULT"):
            raise TypeError(
                f"['weights'] would have no effect on the teacher {source!r}; leave them out. A teacher is {forms}."
            )
        weights = None if suffix == "None" else suffix
    try:
        from torchvision import models
    except ImportError as error:
        raise ImportError(f"The teacher {source!r} needs torchvision: `pip install torchvision`.") from error
    known = models.list_models()
    if name.lower() not in known:
        close = difflib.get_close_matches(name.lower(), known, n=3)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"No torchvision model and no file is called {name!r}.{hint} A teacher is {forms}.")
    choices = list(models.get_model_weights(name).__members__)
    if isinstance(weights, str) and weights.rpartition(".")[2] not in choices:
        raise ValueError(
            f"{name!r} has no weights {weights!r}. Choose from {choices}, or None for an untrained network."
        )
    try:
        model: nn.Module = models.get_model(name, weights=weights, **kwargs)
    except URLError as error:
        raise RuntimeError(
            f"The weights of {source!r} could not be downloaded ({error.reason}). With a connection torchvision keeps "
            "them in the folder of `torch.hub.get_dir()`; copy that to this machine. Or pass a checkpoint with its "
            "class, or None as the weights for an untrained network."
        ) from error
    return model


def from_timm(name: str, kwargs: Mapping[str, Any], *, pretrained: bool) -> nn.Module:
    """A model of timm, with its pretrained weights or without."""
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"The teacher 'timm:{name}' needs timm: `pip install timm`.") from error
    # Names of other sources ("hf-hub:...") are none of timm's own.
    if ":" not in name and not timm.is_model(name):
        close = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"No timm model is called {name!r}.{hint}")
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **kwargs)
    except OSError as error:  # those of all packages that download
        raise RuntimeError(
            f"The weights of 'timm:{name}' could not be downloaded ({type(error).__name__}: {error}). With a "
            "connection timm keeps them in the cache of huggingface_hub; copy that to this machine. Or build the "
            "network with timm.create_model(..., pretrained=False), load weights of your own, and pass it; for an "
            f"untrained one pass ('timm:{name}', None)."
        ) from error
    return model


def from_folder(path: str, model_class: Any, kwargs: Mapping[str, Any]) -> nn.Module:
    """A model that ``save_pretrained`` of transformers, or of a class with ``from_pretrained``, wrote to a folder."""
    if model_class is None:
        try:
            from transformers import AutoModel
        except ImportError as error:
            raise ImportError(
                f"The teacher in the folder {path!r} needs transformers: `pip install transformers`."
            ) from error
        model_class = AutoModel
    if not hasattr(model_class, "from_pretrained"):
        raise TypeError(
            f"The teacher {path!r} is a folder: expected a `model_class` with `from_pretrained`, but got "
            f"{getattr(model_class, '__name__', model_class)!r}. Leave it out, or pass a class of transformers."
        )
    bases = getattr(model_class, "__mro__", ())
    if not any(base.__module__.startswith("transformers.") for base in bases):
        model: nn.Module = model_class.from_pretrained(path, **kwargs)
        return model
    model, found = model_class.from_pretrained(path, **{**kwargs, "output_loading_info": True})
    if new := sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}):
        warn(
            f"The folder {path!r} has no weights of the teacher {type(model).__name__} for {listed(new, at_most=5)}: "
            "these are new random numbers, others in each run. What comes after them cannot be matched or distilled. "
            "Pass the class that was saved, `(folder, model_class)`. A pooler that is not used may be left out: "
            "`load_teacher(folder, add_pooling_layer=False)`."
        )
    return model
