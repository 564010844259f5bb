"""A teacher never goes on from what the student kept of an earlier forward."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from lightning_otrt import RepresentationTransfer
from lightning_otrt.teacher.past_states import check_no_past_states


def gpt(width: int) -> nn.Module:
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=width, n_layer=2, n_head=2, n_positions=16, **ids)).eval()


def test_an_empty_cache_stays_the_students_and_a_filled_one_is_an_error():
    student, ids = gpt(8), torch.randint(20, (4, 6))
    cache = DynamicCache(config=student.config)
    with torch.no_grad():
        expected = student(ids).logits
    transfer = RepresentationTransfer(gpt(16), "blocks")
    with transfer.attached(student):
        logits = student(ids, cache, use_cache=True).logits
        torch.testing.assert_close(logits, expected)
        assert cache.get_seq_length() == 6
        with pytest.raises(ValueError, match=r"of an earlier forward: argument 1 \(DynamicCache\)"):
            student(ids, cache)
        with transfer.paused():
            student(ids, cache)
        assert torch.isfinite(transfer.loss())


@pytest.mark.parametrize("name", ["past_key_values", "mems"])
def test_states_as_tensors(name):
    check_no_past_states((), {name: ()})
    with pytest.raises(ValueError, match=f"{name} .tuple.*teacher_inputs"):
        check_no_past_states((), {name: ((torch.ones(1),),)})
    check_no_past_states((torch.ones(1),), {"hidden": (torch.ones(1),)})
