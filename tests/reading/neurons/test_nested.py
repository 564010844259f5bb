"""Nested tensors as padded tensors with a mask."""

from __future__ import annotations

import pytest
import torch

from lightning_otrt.reading.neurons.nested import lengths_mask, pad_nested


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors(layout: torch.layout) -> None:
    samples = [torch.ones(2, 5), torch.ones(4, 5)]
    nested = torch.nested.nested_tensor(samples, layout=layout)
    for tokens, longest in ((None, 4), (6, 6), (3, 4)):
        padded, mask = pad_nested(nested, tokens)
        assert padded.shape == (2, longest, 5)
        assert mask.tolist() == lengths_mask(torch.tensor([2, 4]), longest).tolist()
        assert padded.sum((1, 2)).tolist() == [10, 20]
