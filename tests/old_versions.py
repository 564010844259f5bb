"""What old versions of torch and of transformers cannot do, as reasons to skip a test."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from packaging.version import Version

__all__ = ["needs_cuda_build", "needs_fake_cuda", "needs_freed_graphs", "needs_one_graph", "skip_newer_models"]

torch_version = Version(torch.__version__)
needs_cuda_build = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a build of torch with CUDA")
needs_fake_cuda = pytest.mark.skipif(
    torch_version < Version("2.7") and not torch.cuda.is_available(),
    reason="before torch 2.7 an index of a fake CUDA tensor starts CUDA, and there is no GPU",
)
needs_one_graph = pytest.mark.skipif(
    torch_version < Version("2.7"), reason="before torch 2.7 `fullgraph=True` refuses the blocks of context managers"
)
#: There the backward pass fails, with the words of torch. With newer versions the tests have to pass.
needs_freed_graphs = pytest.mark.skipif(
    torch_version < Version("2.14") and not hasattr(torch._C._autograd.SavedTensor, "data"),
    reason="this torch does not tell what is freed",
)
#: Tests of models whose layers, their layouts or their arguments are others before transformers 5.
_OF_TRANSFORMERS_5 = (
    "test_properties.py::test_order_of_samples_which_come_by_position[CLIP]",
    "test_properties.py::test_content_of_padding[CLIP]",
    "test_properties.py::test_reach_is_printed_and_is_what_gets_a_gradient[CLIP]",
    "test_two_towers.py::test_both_are_matched",
    "test_padded_ids.py::test_a_pad_token_without_any_mask",
    "test_learned_tokens.py::test_no_warning[Mask2Former, 4 queries]",
    "test_video.py::test_value[ViViT, a class token in front]",
    "test_past_states.py::test_a_state_is_an_error[Mamba",
)


def skip_newer_models(items: list[pytest.Item]) -> None:
    """Skip the tests of models that the installed transformers builds otherwise."""
    try:
        is_old = Version(version("transformers")).major < 5
    except PackageNotFoundError:
        return
    for item in items:
        if is_old and any(name in item.nodeid for name in _OF_TRANSFORMERS_5):
            item.add_marker(pytest.mark.skip(reason="transformers builds this model otherwise before version 5"))
