"""Which part of a student is taken for the student: found, named, or refused with a reason."""

from __future__ import annotations

import copy
import pickle
import re
import warnings

import lightning.pytorch as L
import pytest
import torch
from helpers import make_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_otrt import OTRTCallback, OTRTMonitor, RepresentationTransfer, compare_representations
from lightning_otrt.analysis.validation_distances import ValidationDistances


class Net(nn.Module):
    """Two convolutions and a head, with the method that timm's models have."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(width, 3)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x).mean((2, 3)))


class AutoEncoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3))
        self.decoder = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class Augmented(nn.Module):
    """A trainable augmentation before the network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.augment, self.net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Tanh()), net


X = torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def pairs(transfer: RepresentationTransfer) -> list[tuple[str, str]]:
    return [(pair.student, pair.teacher) for pair in transfer.pairs]


CALLS = {
    "a method of the network": (Net, lambda net: net.forward_features(X)),
    "the network's forward": (Net, lambda net: net.forward(X)),
    "parts one after the other": (lambda: AutoEncoder(6), lambda net: net.decoder(net.encoder(torch.randn(6, 8)))),
    "a trainable augmentation": (lambda: Augmented(Net()), lambda net: net.net(net.augment(X))),
    "a head outside": (
        lambda: nn.ModuleDict({"body": Net(), "projector": nn.Linear(3, 3)}),
        lambda net: net["projector"](net["body"](X)),
    ),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("layers", ["auto", "penultimate"])
def test_a_part_is_not_taken_for_the_whole(name, layers):
    build, call = CALLS[name]
    student, teacher = build(), (AutoEncoder(10) if "parts" in name else Net(6))
    transfer = RepresentationTransfer(teacher, layers)

    def step() -> None:
        call(student)
        transfer.loss()

    with transfer.attached(student), pytest.raises((RuntimeError, ValueError)) as caught:
        step()
    message = str(caught.value)
    assert "student_root=" in message or "No classification head" in message
    assert not any(module._forward_pre_hooks for module in student.modules())


class Parts(nn.Module):
    """As the networks of timm: a method calls modules that hold others, and code calls the head."""

    def __init__(self, width: int, stem: nn.Module) -> None:
        super().__init__()
        self.stem, self.body = stem, nn.Sequential(nn.Conv2d(3, width, 1), nn.ReLU(), nn.Conv2d(width, width, 1))
        self.head = nn.Linear(width, 3)

    def forward_features(self, x):
        return self.body(self.stem(x))

    def forward(self, x):
        return self.head(self.forward_features(x).mean((2, 3)))


class Projected(nn.Module):
    """A normalisation whose layers are of no known type, as in the patch embedding of a ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(3, 3, 1), nn.Identity()

    def forward(self, x):
        return self.norm(self.proj(x).flatten(2)).unflatten(2, x.shape[2:])


@pytest.mark.parametrize("stem", [lambda: nn.Sequential(nn.BatchNorm2d(3)), Projected])
@pytest.mark.parametrize("layers", ["auto", "blocks", "penultimate"])
def test_an_error_inside_of_a_part_names_the_method_that_called_it(stem, layers):
    task = nn.ModuleDict({"net": Parts(4, stem())})
    with (
        RepresentationTransfer(Parts(6, stem()), layers).attached(task),
        pytest.raises(
            ValueError, match=r"pass student_root='net:forward_features' .*, or call 'net' itself. What failed: "
        ),
    ):
        task["net"].forward_features(X.expand(-1, 3, -1, -1))
    transfer = RepresentationTransfer(Parts(6, stem()), {"net.body": "body"}, student_root="net:forward_features")
    with transfer.attached(task):
        task["net"].forward_features(X.expand(-1, 3, -1, -1))
        assert transfer.loss() > 0


class Reads(nn.Module):
    """Takes ids, or embeddings of them that the caller has made."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(9, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True) for _ in "ab")
        self.head = nn.Linear(4, 2)

    def forward(self, ids=None, embeds=None):
        x = self.embed(ids) if embeds is None else embeds
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


@pytest.mark.parametrize("layers", ["auto", "layers.1", {"net.layers.0": "layers.1"}])
def test_inputs_that_a_part_of_the_root_made(layers):
    """The teacher would get the student's embeddings."""
    ids, task = torch.randint(0, 9, (6, 5)), nn.ModuleDict({"net": Reads()})
    warning = "What enters 'net', .* was made by trained modules that ran before it: 'net.embed'"
    for root, warns in ((None, True), ("net", False)):
        transfer = RepresentationTransfer(Reads(), layers, student_root=root)
        with transfer.attached(task), warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            embeds = task["net"].embed(ids)
            task["net"](embeds=embeds + 0.1 * torch.randn_like(embeds))
            transfer.loss()
        assert [bool(re.search(warning, str(one.message))) for one in found] == [True] * warns


@pytest.mark.parametrize("noise", ["none", "leaf", "other"])
def test_inputs_that_need_a_gradient_and_were_not_made_by_the_student(noise):
    ids, task = torch.randint(0, 9, (6, 5)), nn.ModuleDict({"net": Reads()})
    transfer = RepresentationTransfer(Reads(), "auto")
    with transfer.attached(task):
        embeds = task["net"].embed(ids).detach()
        if noise == "leaf":
            embeds = embeds.requires_grad_() + 0
        elif noise == "other":
            embeds = embeds * torch.ones(4, requires_grad=True)
        task["net"](embeds=embeds)
        transfer.loss()


NAMED = {
    "a method of the network": (*CALLS["a method of the network"], "body", "body"),
    "a trainable augmentation": (*CALLS["a trainable augmentation"], "net.body", "net"),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_layer_of_a_part_that_gets_what_others_made(name):
    """Its teacher gets that, too: told, since named layers may well be those of a part."""
    build, call, layer, root = NAMED[name]
    student, transfer = build(), RepresentationTransfer(Net(), {layer: "body"})
    with transfer.attached(student):
        call(student)
        with pytest.warns(UserWarning, match=f"What enters '{root}', .* was made by trained"):
            transfer.loss()
    student, transfer = build(), RepresentationTransfer(Net(), {layer: "body"}, student_root=root)
    with transfer.attached(student):
        call(student)
        transfer.loss()


def test_a_named_layer_of_a_network_that_gets_the_batch():
    build, call = CALLS["a head outside"]
    student, transfer = build(), RepresentationTransfer(Net(6), {"body.body": "body"})
    with transfer.attached(student):
        call(student)
        transfer.loss()


def test_not_strict_warns_and_goes_on():
    student, transfer = AutoEncoder(6), RepresentationTransfer(AutoEncoder(10), strict=False)
    with transfer.attached(student):
        student.decoder(student.encoder(torch.randn(16, 8)))
        with pytest.warns(UserWarning, match="other trained modules ran with gradient outside of it"):
            assert transfer.loss() > 0


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: nn.ModuleDict({"net": net})])
def test_a_method_as_root(wrap):
    """The layers are those of the whole network, and the term is that of a call of the module."""
    net, teacher = Net(), Net(6)
    student = wrap(net)
    prefix = "" if student is net else "net"
    expected, named = (
        RepresentationTransfer(teacher),
        RepresentationTransfer(teacher, student_root=f"{prefix}:forward_features"),
    )
    with expected.attached(net):
        net(X)
        value = expected.loss()
    with named.attached(student):
        net.forward_features(X)
        found = named.loss()
        net.forward_features(X)
        named.loss()
        plain = copy.deepcopy(student)
        again = pickle.loads(pickle.dumps(student))
    assert "forward_features" not in vars(net)
    for other in (plain, again):
        inner = other if student is net else other["net"]
        assert torch.equal(inner.forward_features(X), net.forward_features(X))
        assert getattr(inner.forward_features, "__func__", None) is Net.forward_features
    assert [pair.student.removeprefix("net.") for pair in named.pairs] == [pair.student for pair in expected.pairs]
    assert found.item() == pytest.approx(value.item(), rel=1e-5)
    assert f"root: '{prefix}:forward_features'" in named.pairing.note


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: nn.ModuleDict({"net": net})])
def test_distances_of_validation_where_a_method_is_the_root(wrap):
    """They are those of a comparison, whose forwards call the whole module."""
    net, teacher = Net(), Net(6)
    student = wrap(net)
    layers = {"body": "body"} if student is net else {"net.body": "body"}
    root = ":forward_features" if student is net else "net:forward_features"
    transfer = RepresentationTransfer(teacher, layers, student_root=root)
    with transfer.attached(student):
        net.forward_features(X)
        transfer.loss()
        distances = ValidationDistances(transfer, student)
        with torch.no_grad():
            net.forward_features(X)
            net.forward_features(2 * X[:4])
        [found] = distances.compute()
        distances.close()
        net.forward_features(X)
        assert len(transfer.views) == 1, "training is still recorded"
        transfer.loss()
    assert "forward_features" not in vars(net)
    assert distances.forwards == 2
    expected = compare_representations(net, teacher, [X, 2 * X[:4]], layers=["body"], progress=False)
    torch.testing.assert_close(found, expected.distances[0, 0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("first", [0, 1])
def test_two_transfers_at_one_method(first):
    """Each records until it is detached, in whatever order."""
    net = Net()
    transfers = [RepresentationTransfer(Net(6), {"body": "body"}, student_root=":forward_features") for _ in "ab"]
    blocks = [transfer.attached(net) for transfer in transfers]
    for block in blocks:
        block.__enter__()
    for _ in range(2):
        net.forward_features(X)
        assert all(transfer.loss() > 0 for transfer in transfers)
    blocks[first].__exit__(None, None, None)
    net.forward_features(X)
    assert transfers[1 - first].loss() > 0
    blocks[1 - first].__exit__(None, None, None)
    net.forward_features(X)
    assert not any(transfer.views for transfer in transfers)


def test_the_monitor_logs_distances_where_a_method_is_the_root():
    class Task(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.head = Net(), nn.Linear(4, 3)

        def training_step(self, batch, batch_idx):
            return self.head(self.net.forward_features(batch).mean((2, 3))).square().mean()

        def validation_step(self, batch, batch_idx):
            self.net.forward_features(batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    callback = OTRTCallback(Net(), {"net.body": "body"}, student_root="net:forward_features", plan="identity")
    callbacks = [callback, OTRTMonitor(1, figures=False)]
    trainer = make_trainer(max_epochs=1, callbacks=callbacks, limit_val_batches=None)
    trainer.fit(Task(), DataLoader(X, 6), DataLoader(X, 6))
    metrics = trainer.callback_metrics
    assert float(metrics["val/otrt/net.body"]) == pytest.approx(float(metrics["train/otrt"]), rel=1e-3)


def test_a_method_that_fails_closes_its_view():
    net, transfer = Net(), RepresentationTransfer(Net(6), student_root=":forward_features")
    with transfer.attached(net):
        net.forward_features(X)
        transfer.loss()
        with pytest.raises(RuntimeError):
            net.forward_features(torch.randn(6, 2, 16, 16))
        transfer.discard()
        net.forward_features(X)
        assert len(transfer.views) == 1
        transfer.loss()


def test_methods_are_checked():
    transfer = RepresentationTransfer(Net(), student_root=":forward_featurs")
    with pytest.raises(ValueError, match="no method 'forward_featurs'"):
        transfer.attach(Net())
    for student, given, right in (
        (Net(), "forward_features", ":forward_features"),
        (nn.ModuleDict({"net": Net()}), "net.forward_features", "net:forward_features"),
    ):
        transfer = RepresentationTransfer(Net(), student_root=given)
        with pytest.raises(ValueError, match=f"Write '{right}' for that method"):
            transfer.attach(student)


def test_an_encoder_learns_from_the_encoder():
    student, teacher = AutoEncoder(6), AutoEncoder(10)
    transfer = RepresentationTransfer(teacher, student_root="encoder")
    with transfer.attached(student):
        student.decoder(student.encoder(torch.randn(16, 8)))
        transfer.loss()
    assert pairs(transfer) == [("encoder.2:input", "encoder.2:input")]


def test_a_whole_teacher_of_the_class_of_the_root_stays_whole():
    """As where both are a causal language model, whose child is called like the student's attribute."""
    student = nn.ModuleDict({"body": Net()})
    teacher = Net(6)
    transfer = RepresentationTransfer(teacher, student_root="body")
    with transfer.attached(student):
        student["body"](X)
        transfer.loss()
    assert pairs(transfer) == [("body.stem", "stem"), ("body.body", "body")]


def test_the_table_says_what_is_reached():
    told: list[str] = []
    student, transfer = nn.ModuleDict({"net": Net()}), RepresentationTransfer(Net(6))
    transfer.report = told.append
    with transfer.attached(student):
        student["net"](X)
        transfer.loss()
    assert "root: 'net'; 4 of 6 trained tensors lie before the recorded layers" in told[0]


@pytest.mark.parametrize("first", ["model", "backbone"])
def test_a_module_under_two_names_is_one(first):
    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
            self.backbone = self.model

    task, teacher = Task(), nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 3))
    transfer = RepresentationTransfer(teacher, {f"{first}.1": "1"})
    with transfer.attached(task):
        getattr(task, first)(torch.randn(16, 8))
        transfer.loss()
    assert [teacher for _, teacher in pairs(transfer)] == ["1"]


def test_names_of_a_model_that_fabric_has_set_up():
    fabric = pytest.importorskip("lightning").Fabric(accelerator="cpu")
    model = fabric.setup(Net())
    for layers in ({"body": "body"}, "auto"):
        transfer = RepresentationTransfer(Net(6), layers)
        with transfer.attached(model):
            model(X)
            transfer.loss()
        assert pairs(transfer)[-1] == ("body", "body")


def test_inputs_that_are_written_to_in_place():
    class Scaled(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.div_(255))

    seen: list[float] = []
    student, transfer = Scaled(), RepresentationTransfer(Scaled(6))
    student.stem.register_forward_pre_hook(lambda module, args: seen.append(float(args[0].abs().max())))
    with transfer.attached(student):
        for step in range(3):
            x = torch.full((4, 1, 16, 16), 255.0)
            if step:
                student(x)
            else:
                with pytest.warns(UserWarning, match="in place"):
                    student(x)
            transfer.loss()
            assert float(x.max()) == 1.0  # by the student's own forward, once
    assert set(seen) == {1.0}


def test_a_dictionary_that_is_popped_from():
    class Pops(Net):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return super().forward(batch.pop("x"))

    student, transfer = Pops(), RepresentationTransfer(Pops(6))
    with transfer.attached(student):
        for _ in range(2):
            student({"x": X})
            transfer.loss()
