"""Teachers as people have them: compiled, scripted, in another type, trained by their owner, with a new head."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_otrt import OTRTCallback, RepresentationTransfer, neurons, transport_distance
from lightning_otrt.reading.extra_forwards.evaluation import in_evaluation

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
VECTORS = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


def resnet(seed: int = 0, classes: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=classes)


def convnet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=5)


def bert(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    return transformers.BertModel(config)


def perceptron(seed: int = 0, width: int = 6) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3))


def term(student: nn.Module, teacher: Any, layers: Any, *inputs: Tensor, **options: Any) -> float:
    transfer = RepresentationTransfer(teacher, layers, **options)
    with transfer.attached(student):
        student(*inputs)
        return transfer.loss().item()


# The forms of a teacher that give the term of the plain module.


def scripted(net: nn.Module) -> nn.Module:
    return torch.jit.script(net)


def frozen(net: nn.Module) -> nn.Module:
    return torch.jit.freeze(torch.jit.script(net.eval()))


def traced(net: nn.Module) -> nn.Module:
    return torch.jit.trace(net.eval(), IMAGES)


def compiled(net: nn.Module) -> nn.Module:
    return torch.compile(net, backend="eager")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("form", "build", "layers"),
    [
        (compiled, resnet, "auto"),
        (compiled, convnet, {"layer4": "layer4"}),
        (scripted, resnet, {"fc": ""}),
        (frozen, resnet, {"fc": ""}),
        (traced, convnet, {"fc": ""}),
    ],
)
def test_another_form_of_the_teacher_gives_the_same_term(
    form: Callable[..., nn.Module], build: Callable[[], nn.Module], layers: Any
) -> None:
    teacher, student = build().double(), resnet(1).double()
    global_images = IMAGES.double()
    expected = term(student, teacher, layers, global_images)
    if form is traced:
        other = torch.jit.trace(copy.deepcopy(teacher).eval(), global_images)
    else:
        other = form(copy.deepcopy(teacher))
    assert term(student, other, layers, global_images) == pytest.approx(expected, rel=1e-6)
    assert expected > 0.01


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_a_student_with_a_scripted_part() -> None:
    student, teacher = nn.Sequential(nn.Linear(8, 8), perceptron(1)), perceptron(2)
    expected = term(student, teacher, "penultimate", VECTORS)
    student[0] = torch.jit.script(student[0])
    assert term(student, teacher, "penultimate", VECTORS) == pytest.approx(expected, rel=1e-5)
    assert term(student, teacher, {"0": "1"}, VECTORS) > 0, "what TorchScript gives back can be recorded"


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_layers_inside_of_torchscript() -> None:
    with pytest.raises(ValueError, match=r"'1' \(RecursiveScriptModule\) is inside the TorchScript module '', which"):
        term(perceptron(), torch.jit.script(perceptron(1)), {"1": "1"}, VECTORS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Please use quant_min")
def test_observers_of_quantization_that_grow() -> None:
    from torch.ao import quantization

    student = perceptron().train()
    student.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(student, inplace=True)
    sizes = {name: buffer.shape for name, buffer in student.named_buffers()}
    with in_evaluation(student):
        student(VECTORS)
        assert {name: buffer.shape for name, buffer in student.named_buffers()} != sizes
    assert {name: buffer.shape for name, buffer in student.named_buffers()} == sizes
    assert term(student, perceptron(1), "penultimate", VECTORS) > 0


WEIGHTS = {
    "old weight norm": lambda layer: torch.nn.utils.weight_norm(layer),
    "weight norm": lambda layer: torch.nn.utils.parametrizations.weight_norm(layer),
    "spectral norm": lambda layer: torch.nn.utils.parametrizations.spectral_norm(layer),
    "old spectral norm": lambda layer: torch.nn.utils.spectral_norm(layer),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_copy_in_another_type_of_computed_weights(name: str) -> None:
    teacher = perceptron(1)
    WEIGHTS[name](teacher[0])
    teacher(VECTORS)  # the weight is now a tensor with a graph
    plain = term(perceptron(), teacher, {"1": "1"}, VECTORS)
    assert term(perceptron(), teacher, {"1": "1"}, VECTORS, teacher_dtype="float64") == pytest.approx(plain, rel=1e-3)


def test_wav2vec_with_weight_norm_in_bfloat16() -> None:
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=(8, 8),
        conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    teacher, student = transformers.Wav2Vec2Model(config), transformers.Wav2Vec2Model(config)
    sound = torch.randn(4, 800)
    options = {"teacher_dtype": "bfloat16"}
    assert term(student, teacher, {"encoder.layers.1": "encoder.layers.1"}, sound, **options) > 0


# The type of the teacher.


@pytest.mark.parametrize(
    ("build", "layers", "inputs"),
    [
        (resnet, {"layer4": "layer4"}, IMAGES),
        (convnet, {"layer4": "layer4"}, IMAGES),
        (bert, {"encoder.layer.1": "encoder.layer.1"}, torch.arange(48).view(4, 12) % 50),
        (perceptron, {"1": "1"}, VECTORS),
    ],
)
def test_a_bfloat16_teacher_of_a_float32_student(build: Any, layers: Any, inputs: Tensor) -> None:
    """It runs as it is: no copy, and the value is that of its own outputs."""
    teacher, student = build(1).bfloat16().eval(), build(2).eval()
    transfer = RepresentationTransfer(teacher, layers, weight=1.0, plan="exact")
    with transfer.attached(student):
        student(inputs)
        assert transfer.teacher.module is teacher
        assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
        found = transfer.loss()
    ((own, other),) = layers.items()
    outputs = []
    for net, name in ((student, own), (teacher, other)):
        hook = net.get_submodule(name).register_forward_hook(lambda module, args, output: outputs.append(output))
        with hook, torch.no_grad():
            net(inputs.to(next(net.parameters()).dtype) if inputs.is_floating_point() else inputs)
    first, second = (output[0] if isinstance(output, tuple) else output for output in outputs)
    axis = -1 if build is bert else 1
    y, x = (neurons(output.float(), neuron_axis=axis) for output in (first, second))
    expected = transport_distance(y, x, plan="exact").value
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)


def writes_in_place(net: nn.Module) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)


def writes_data(net: nn.Module) -> None:
    """As DINO, MoCo and others do. Such writes raise no version."""
    for parameter in net.parameters():
        parameter.data.mul_(2)


def loads(net: nn.Module) -> None:
    net.load_state_dict({name: 2 * value for name, value in net.state_dict().items()}, assign=True)


def updates_buffers(net: nn.Module) -> None:
    for buffer in net.buffers():
        if buffer.is_floating_point():
            buffer.add_(1)


@pytest.mark.parametrize(
    ("build", "inputs", "update"),
    [
        (resnet, IMAGES, writes_data),
        (resnet, IMAGES, updates_buffers),
        (bert, torch.arange(48).view(4, 12) % 50, loads),
        *((perceptron, VECTORS, update) for update in (writes_in_place, writes_data, loads)),
    ],
)
def test_a_teacher_that_its_owner_trains(build: Any, inputs: Tensor, update: Callable[[nn.Module], None]) -> None:
    teacher, student = build(1), build(2)
    transfer = RepresentationTransfer(teacher, teacher_dtype="bfloat16", memory=0.0)
    with transfer.attached(student):
        for _ in range(3):
            student(inputs)
            transfer.loss()
            running = transfer.teacher.module
            for own, copied in zip(teacher.state_dict().values(), running.state_dict().values(), strict=True):
                torch.testing.assert_close(copied, own.to(copied.dtype), rtol=0, atol=0)
            update(teacher)
    assert running is not teacher


# Resumed runs.


class Task(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def fit(teacher: nn.Module, path: Any, *, epochs: int, resume: bool, build: Any, layers: Any, **options: Any) -> Any:
    callback = OTRTCallback(teacher, layers, **options)
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    inputs = VECTORS if build is perceptron else IMAGES
    trainer.fit(Task(build(2)), DataLoader(inputs, 4), ckpt_path=path if resume else None, weights_only=resume or None)
    trainer.save_checkpoint(path)
    return callback.transfer.engine.calls


HEADS = {
    "timm": (convnet, {"net.layer4": "layer4"}, "fc", "layer3.0.conv2"),
    "torchvision, what enters the head": (resnet, {"net.fc:input": "fc:input"}, "fc", "layer4.0.conv1"),
    "by hand": (perceptron, {"net.1": "1"}, "2", "0"),
}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("name", HEADS)
def test_a_teacher_with_a_new_head_is_resumed(name: str, tmp_path: Any) -> None:
    build, layers, head, body = HEADS[name]
    options = {"build": build, "layers": layers}
    calls = fit(build(1), tmp_path / "a", epochs=1, resume=False, **options)
    teacher = build(1)
    teacher.get_submodule(head).reset_parameters()
    assert fit(teacher, tmp_path / "a", epochs=2, resume=True, **options) == 2 * calls
    nn.init.normal_(teacher.get_submodule(body).weight)
    with pytest.raises((ValueError, L.fabric.utilities.exceptions.MisconfigurationException), match="teacher"):
        fit(teacher, tmp_path / "a", epochs=3, resume=True, **options)
    with pytest.warns(UserWarning, match="because of strict=False"):
        fit(teacher, tmp_path / "a", epochs=3, resume=True, strict=False, **options)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("64-true", torch.float64)])
def test_a_precision_plugin_takes_the_teacher_along(precision: Any, dtype: torch.dtype) -> None:
    teacher, seen = perceptron(1), []

    class Seen(L.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            seen.append(next(callback.transfer.teacher.module.parameters()).dtype)

    callback = OTRTCallback(teacher, {"net.1": "1"})
    L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, precision=precision,
        callbacks=[callback, Seen()], enable_progress_bar=False, enable_model_summary=False,
    ).fit(Task(perceptron(2)), DataLoader(VECTORS, 4))  # fmt: skip
    assert set(seen) == {dtype}
    assert next(teacher.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    "given", [resnet().state_dict(), dict(resnet().named_parameters()), [resnet().state_dict()], torch.randn(10_000)]
)
def test_weights_in_place_of_a_teacher_give_a_short_error(given: Any) -> None:
    with pytest.raises(TypeError) as caught:
        OTRTCallback(given)
    message = str(caught.value)
    assert len(message) < 800, message[:2000]
    assert re.search("Expected `teacher` to be .* but got", message)
    assert ("holds weights" in message) == isinstance(given, dict)
