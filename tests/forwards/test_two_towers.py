"""Images beside prompts: each tower has a number of samples of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

from lightning_otrt import RepresentationTransfer, neurons, transport_distance

LAYERS = [f"{tower}_model.encoder.layers.{index}" for tower in ("vision", "text") for index in (0, 1)]


def clip(width: int) -> nn.Module:
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"eos_token_id": 49, "bos_token_id": 48, "pad_token_id": 0}
    text = {**sizes, **ids, "vocab_size": 50, "max_position_embeddings": 16}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()


def readings(net, inputs):
    found = {}
    handles = [
        net.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: found.update({name: output})
        )
        for name in LAYERS
    ]
    net(**inputs)
    for handle in handles:
        handle.remove()
    values = []
    for name in LAYERS:
        output = found[name][0] if isinstance(found[name], tuple) else found[name]
        if name.startswith("vision"):  # the patches behind the class token, as a map of 4 x 4
            output = output[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
        values.append(neurons(output, neuron_axis=1 if output.dim() == 4 else -1))
    return values


@pytest.mark.parametrize("images", [5, 8, 3])
def test_both_are_matched(images):
    student, teacher = clip(8), clip(16)
    prompts = torch.randint(1, 48, (5, 10))
    inputs = {"input_ids": prompts, "pixel_values": torch.randn(images, 3, 32, 32)}
    transfer = RepresentationTransfer(teacher, plan="exact")
    report: list[str] = []
    transfer.report = report.append
    with transfer.attached(student):
        student(**inputs)
        transfer.loss()
    assert sorted(pair.student for pair in transfer.pairs) == sorted(LAYERS)
    both = zip(readings(student, inputs), readings(teacher, inputs), strict=True)
    by_hand = torch.stack([transport_distance(y, x, plan="exact").value for y, x in both]).mean()
    torch.testing.assert_close(transfer.transport_value, by_hand)
    assert "75 of 78 trained tensors" in report[0]
