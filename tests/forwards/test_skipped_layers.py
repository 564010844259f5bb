"""Training that runs other code than evaluation: layers that are skipped at random or run more often."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from processes import run_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import BartConfig, BartModel, Data2VecAudioConfig, Data2VecAudioModel, Wav2Vec2Config, Wav2Vec2Model

from lightning_otrt import LinearWarmup, OTRTCallback, OTRTMonitor, RepresentationTransfer

SPEECH = {
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 3,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "layerdrop": 0.4,
}


def wav2vec(width: int) -> nn.Module:
    return Wav2Vec2Model(Wav2Vec2Config(hidden_size=width, **SPEECH))


def data2vec(width: int) -> nn.Module:
    return Data2VecAudioModel(Data2VecAudioConfig(hidden_size=width, **SPEECH))


def bart(width: int) -> nn.Module:
    heads = {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
    layers = {f"{part}_layers": 3 for part in ("encoder", "decoder")} | {"encoder_layerdrop": 0.5}
    return BartModel(BartConfig(vocab_size=40, d_model=width, max_position_embeddings=20, **heads, **layers))


class Skipping(nn.Module):
    """Residual blocks, each of which a training forward skips with probability one half."""

    def __init__(self, width: int = 6, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(8, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(blocks))
        self.head = nn.Linear(width, 2)
        self.ran: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        self.ran = [not self.training or bool(torch.rand(()) < 0.5) for _ in self.blocks]
        for block, runs in zip(self.blocks, self.ran, strict=True):
            x = x + block(x) if runs else x
        return self.head(x)


def blocks(count: int = 3) -> dict[str, str]:
    return {f"blocks.{index}": f"blocks.{index}" for index in range(count)}


MODELS: dict[str, tuple[Callable[[int], nn.Module], Any, Callable[[], tuple[Tensor, ...]]]] = {
    "Wav2Vec2": (wav2vec, "auto", lambda: (torch.randn(4, 400),)),
    "Data2Vec": (data2vec, "blocks", lambda: (torch.randn(4, 400),)),
    "BART": (bart, ["encoder.layers.*"], lambda: (torch.randint(3, 40, (6, 7)),)),
    "blocks": (Skipping, blocks(), lambda: (torch.randn(9, 8),)),
    "one block": (lambda width: Skipping(width, 1), blocks(1), lambda: (torch.randn(9, 8),)),
}


@pytest.mark.parametrize("name", MODELS)
def test_layers_that_training_skips_at_random(name: str) -> None:
    """The term is the sum over the layers that ran, each with its own weight and plan."""
    build, layers, draw = MODELS[name]
    torch.manual_seed(0)
    student, transfer = build(16).train(), RepresentationTransfer(build(24), layers, weight=2.0)
    skipped = 0
    with transfer.attached(student):
        for step in range(30):
            torch.manual_seed(step)
            student.zero_grad()
            student(*draw())
            ran = {key for view in transfer.views for key in view.student}
            loss = transfer.loss()
            expected = [
                2.0 * pair.weight * d.value
                for pair, d in zip(transfer.pairs, transfer.distances, strict=True)
                if not d.is_skipped
            ]
            torch.testing.assert_close(loss.detach(), sum(expected, torch.zeros(())))
            assert {index for index, d in enumerate(transfer.distances) if not d.is_skipped} == ran
            skipped += len(transfer.pairs) - len(ran)
            if ran:
                loss.backward()
            assert not transfer.views
    assert skipped
    assert transfer.engine.calls == 30


def test_the_distance_is_that_of_a_student_that_never_skips() -> None:
    """By hand: the distance of a block that ran, from the same inputs, in a network of that block alone."""
    torch.manual_seed(0)
    student, teacher = Skipping(), Skipping(7)
    transfer = RepresentationTransfer(teacher, blocks(), weight=1.0, plan="exact", solve_every=1, memory=0.0)
    x, seen = torch.randn(12, 8), 0
    with transfer.attached(student):
        for step in range(6):
            torch.manual_seed(step)
            student(x)
            ran = student.ran
            transfer.loss()
            with torch.no_grad():
                own = student.stem(x)
                for index, runs in enumerate(ran):
                    if not runs:
                        assert transfer.distances[index].value.isnan()
                        continue
                    z = student.blocks[index](own)
                    own = own + z
                    t = teacher.stem(x)
                    for block in teacher.blocks[: index + 1]:
                        given, t = block(t), t + block(t)
                    cost = 1 - torch.corrcoef(torch.cat([z.T, given.T]))[: z.shape[1], z.shape[1] :]
                    expected = (transfer.distances[index].plan * cost).sum()
                    torch.testing.assert_close(transfer.distances[index].value, expected, rtol=1e-4, atol=1e-5)
                    seen += 1
    assert seen > 4


class Never(nn.Module):
    """The second block runs in evaluation mode alone."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(x if self.training else self.second(x))


NEVER = "student layer 'second' did not run in this forward nor in any before"


def test_a_layer_that_never_runs_is_an_error_after_32_calls() -> None:
    student, transfer = Never(), RepresentationTransfer(Never(7), {"first": "first", "second": "second"})
    with transfer.attached(student):
        for _ in range(31):
            student(torch.randn(9, 8))
            transfer.loss()
        student(torch.randn(9, 8))
        with pytest.raises(RuntimeError, match=NEVER):
            transfer.loss()
        transfer.reset()


class Domains(nn.Module):
    """A branch for each domain."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, width), nn.Linear(width, 2)
        self.branches = nn.ModuleDict({name: nn.Linear(width, width) for name in "ab"})

    def forward(self, x: Tensor, domain: str) -> Tensor:
        return self.head(self.branches[domain](self.first(x)))


def test_a_layer_that_runs_no_more_is_told_after_32_calls() -> None:
    student, transfer = Domains(), RepresentationTransfer(Domains(7), ["first", "branches.a"])
    with transfer.attached(student):
        for domain in ("a", *"b" * 20, "a", *"b" * 31):
            student(torch.randn(9, 8), domain)
            transfer.loss()
        student(torch.randn(9, 8), "b")
        with pytest.warns(UserWarning, match=r"layer 'branches.a' did not run in the last 32 steps"):
            transfer.loss()
        for _ in range(40):
            student(torch.randn(9, 8), "b")
            transfer.loss()


@pytest.mark.parametrize(("compiled", "calls"), [(False, 8), (True, 1)])
def test_where_no_layer_ever_runs_the_error_comes_early(compiled: bool, calls: int) -> None:
    """At once where compiled code may lack the hooks; else training may skip all of them in the first calls."""
    student, transfer = Never(), RepresentationTransfer(Never(7), {"second": "second"})
    if compiled:
        student.first.compile(backend="eager")
    with transfer.attached(student):
        for _ in range(calls - 1):
            student(torch.randn(9, 8))
            assert transfer.loss() == 0
        student(torch.randn(9, 8))
        with pytest.raises(RuntimeError, match=rf"{NEVER}.*skipped in training.*such as its parent"):
            transfer.loss()
        assert not transfer.views
        transfer.reset()


def run(transfer: RepresentationTransfer, student: nn.Module, calls: int) -> None:
    with transfer.attached(student):
        for _ in range(calls):
            student(torch.randn(9, 8))
            transfer.loss()


@pytest.mark.parametrize(("layers", "calls"), [(("second",), 1), (("first", "second"), 2)])
def test_a_layer_that_never_runs_is_an_error_at_the_end_of_the_block(layers: tuple[str, ...], calls: int) -> None:
    student, transfer = Never(), RepresentationTransfer(Never(7), list(layers))
    with pytest.raises(RuntimeError, match=NEVER):
        run(transfer, student, calls)
    assert not transfer.is_attached


class Planned(Skipping):
    """Blocks that run in the steps that a plan tells."""

    plan = iter(())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        runs = next(self.plan) if self.training and torch.is_grad_enabled() else (True,) * 3
        for block, is_on in zip(self.blocks, runs, strict=True):
            x = x + block(x) if is_on else x
        return self.head(x)


@pytest.mark.parametrize("skips", [True, False])
def test_a_short_block_in_which_layers_are_skipped_at_random(skips: bool) -> None:
    """The last block never runs: by chance, where the second one ran in some steps alone."""
    student, transfer = Planned(), RepresentationTransfer(Planned(7), blocks())
    steps = [(True, not skips or index % 2 == 0, False) for index in range(4)]
    student.plan = iter(steps)
    if skips:
        run(transfer, student, len(steps))
    else:
        with pytest.raises(RuntimeError, match=NEVER.replace("second", "blocks.2")):
            run(transfer, student, len(steps))


def test_not_strict_goes_on_with_the_others() -> None:
    student = Never()
    transfer = RepresentationTransfer(Never(7), {"first": "first", "second": "second"}, strict=False, weight=1.0)
    with warnings.catch_warnings(record=True) as caught, transfer.attached(student):
        warnings.simplefilter("always")
        for _ in range(34):
            student(torch.randn(9, 8))
            loss = transfer.loss()
        torch.testing.assert_close(loss.detach(), transfer.distances[0].value / 2)
    assert len(caught) == 1
    assert "'second' did not run" in str(caught[0].message)


class FreeRunning(nn.Module):
    """A decoder that training runs step by step, and evaluation once."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(8, 8), nn.Linear(8, width)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3 if self.training else 1):
            x = torch.tanh(self.cell(x))
        return self.head(x)


def test_a_layer_that_training_runs_more_often_is_an_error() -> None:
    student, transfer = FreeRunning(), RepresentationTransfer(FreeRunning(7), {"cell": "cell"})
    with transfer.attached(student):
        student(torch.randn(9, 8))
        with pytest.raises(RuntimeError, match=r"'cell' ran 3 times in this forward, but once when the layers were"):
            transfer.loss()


class Boring(BoringModel):
    """Lightning's demo module with a network that skips blocks."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(32, 8), net)


def fitted(net: nn.Module, layers: Any, **options: Any) -> tuple[OTRTCallback, dict[str, Tensor]]:
    teacher = copy.deepcopy(Boring(net).layer)
    callback = OTRTCallback(teacher, layers, student_root="layer", **options)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        limit_val_batches=1,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, OTRTMonitor(every_n_steps=1, figures=False)],
    )
    data = DataLoader(RandomDataset(32, 96), batch_size=8)
    trainer.fit(Boring(net), data, data)
    return callback, trainer.callback_metrics


def test_a_fit_with_the_monitor() -> None:
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(transport plan|gradient of the transfer|starts with the weights)")
        callback, metrics = fitted(Skipping(), {f"layer.1.{name}": f"1.{name}" for name in blocks()})
    assert callback.transfer.engine.calls == 12
    assert all(value.isfinite() for name, value in metrics.items() if "otrt" in name)
    assert {f"val/otrt/layer.1.blocks.{index}" for index in range(3)} <= set(metrics)


def test_a_fit_without_the_layer_is_an_error_at_the_end_of_the_epoch() -> None:
    with pytest.raises(RuntimeError, match=r"'layer\.1\.second' did not run"):
        fitted(Never(), {"layer.1.first": "1.first", "layer.1.second": "1.second"}, schedule=LinearWarmup(2))


def train_apart(build: str) -> tuple[list[list[bool]], list[float], list[float]]:
    """Which layers ran here, the terms, and the sum of the gradients, where each process skips others."""
    make, layers, draw = MODELS[build]
    torch.manual_seed(0)
    student, transfer = make(16).train(), RepresentationTransfer(make(24), layers, weight=2.0)
    model = DistributedDataParallel(student, find_unused_parameters=True)
    ran, terms = [], []
    with transfer.attached(model):
        for step in range(12):
            torch.manual_seed(100 * dist.get_rank() + step)
            output = model(*draw())
            ran.append([index in transfer.views[0].student for index in range(3)])
            task = (output if isinstance(output, Tensor) else output.last_hidden_state).square().mean()
            loss = transfer.loss()
            (task + loss).backward()
            terms.append(float(loss.detach()))
    return ran, terms, [float(p.grad.sum()) for p in student.parameters() if p.grad is not None]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blocks", "Wav2Vec2"])
def test_two_processes_that_skip_other_layers(name: str) -> None:
    """They neither wait for each other nor disagree."""
    (ran, terms, gradients), (others, same, averaged) = run_processes(2, train_apart, name)
    assert ran != others
    assert any(not any(each) for each in ran) or name != "blocks"  # a process without any layer takes part
    assert terms == same
    assert all(term > 0 for term in terms)
    assert gradients == pytest.approx(averaged)
