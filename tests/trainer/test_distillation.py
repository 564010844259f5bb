"""Distillation of logits in a fit: the weights that a loss by hand gives, in every setting and by each way in."""

from __future__ import annotations

import copy
import re
from typing import Any

import lightning as L
import lightning.pytorch as pl
import pytest
import torch
from helpers import (
    LAYERS,
    Net,
    Task,
    ValidatedTask,
    assert_agree,
    assert_same,
    forwards,
    hooks,
    loader,
    make_task,
    make_teacher,
    make_trainer,
    weights,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import LBFGS
from trainer.contexts import CONTEXTS, Context, by_name, without
from trainer.fits import Seen, fitted, make_callback

from lightning_otrt import LogitDistillation, OTRTCallback, OTRTModule, OTRTMonitor, RepresentationTransfer
from lightning_otrt.analysis.weight import suggest_weight

OPTIONS: dict[str, Any] = {
    "layers": LAYERS,
    "weight": 0,
    "distillation": LogitDistillation(20.0, temperature=2.0),
}


def other_classes() -> Net:
    teacher = make_teacher()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        teacher.head = nn.Linear(teacher.head.in_features, 7)
    return teacher


class ByHand:
    """The recipe as a user would write it, with hooks of their own."""

    def __init__(self, task: Task, teacher: nn.Module) -> None:
        self.task, self.teacher = task, teacher.eval()
        self.seen: list[tuple[Tensor, Tensor]] = []
        if hasattr(task, "net"):
            self.hook()

    def hook(self) -> None:
        self.task.net.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
            self.seen.append((args[0], output))

    def __call__(self) -> Tensor:
        self.teacher = self.teacher.to(next(self.task.parameters()).dtype)
        terms = []
        for x, logits in self.seen:
            with torch.no_grad():
                target = self.teacher(x.to(next(self.teacher.parameters()).dtype))
            wide = torch.promote_types(logits.dtype, torch.float32)
            soft, target = (F.log_softmax(values.to(wide) / 2, dim=1) for values in (logits, target))
            terms.append(4 * F.kl_div(soft, target, reduction="batchmean", log_target=True))
        self.seen = []
        return 20.0 * torch.stack(terms).mean()

    def discard(self) -> None:
        self.seen = []


def distilled_by_hand(context: Context) -> dict[str, Tensor]:
    task = context.make()
    term = ByHand(task, make_teacher())
    if context.late:
        configure = task.configure_model

        def configured() -> None:
            configure()
            term.hook()

        task.configure_model = configured  # type: ignore[method-assign]
    task.term = term
    context.fit(task)
    return weights(task)


@pytest.mark.parametrize("name", CONTEXTS)
def test_the_weights_of_a_loss_by_hand(name):
    context = CONTEXTS[name]
    task, teacher = context.make(), make_teacher()
    context.fit(task, callbacks=[OTRTCallback(teacher, **OPTIONS)])
    assert not hooks(task, teacher)
    expected = distilled_by_hand(context)
    assert_agree(weights(task), expected, without(context), max(context.tolerance, 1e-6))


@pytest.mark.parametrize("make", [make_teacher, other_classes])
@pytest.mark.parametrize("weight", [0, 2.0])
def test_the_ways_in_agree_to_the_last_bit(make, weight):
    options = {**OPTIONS, "weight": weight}
    task = make_task()
    make_trainer(callbacks=[OTRTCallback(make(), **options)]).fit(task, loader())
    wrapped = make_task()
    make_trainer().fit(OTRTModule(wrapped, make(), **options), loader())
    by_loop, transfer = make_task(), RepresentationTransfer(make(), **options)
    by_loop.term = transfer.loss
    with transfer.attached(by_loop):
        make_trainer().fit(by_loop, loader())
    assert_same(weights(wrapped), weights(task))
    assert_same(weights(by_loop), weights(task))


class TwoViews(Task):
    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1]) + F.cross_entropy(self.net(batch[0].flip(-1)), batch[1])


def test_several_views():
    context = Context(TwoViews)
    task = context.make()
    context.fit(task, callbacks=[OTRTCallback(make_teacher(), **OPTIONS)])
    assert_agree(weights(task), distilled_by_hand(context), without(context))


class WithLbfgs(Task):
    def configure_optimizers(self) -> Any:
        return LBFGS(self.parameters(), lr=0.1, max_iter=3)


@pytest.mark.parametrize("make", [make_teacher, other_classes])
def test_closures_of_lbfgs_are_one_call(make):
    callback = make_callback(make(), distillation=1.0)
    fitted([callback], task=make_task(WithLbfgs, norm=False), max_steps=3)
    assert callback.transfer.run_state.distillation.calls == 3


@pytest.mark.parametrize("make", [make_teacher, pytest.param(other_classes, marks=pytest.mark.slow)])
def test_compiled(make):
    """The graph that the compiler sees gives what plain code gives."""
    torch.compiler.reset()
    found = []
    for compiled in (False, True):
        task = make_task()
        if compiled:
            task.net = torch.compile(task.net, backend="eager")
        callback, seen = make_callback(make(), weight=2.0, distillation=0.5), Seen()
        make_trainer(callbacks=[callback, seen], precision="64-true").fit(task, loader())
        found.append((by_name(weights(task)), [values["train/distillation"] for values in seen.values]))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-9)
    torch.testing.assert_close(found[0][0], found[1][0])


class TestLogs:
    @pytest.mark.parametrize("weight", [0, 2.0])
    def test_names(self, weight):
        callback, seen = make_callback(weight=weight, distillation=0.5), Seen()
        fitted([callback, seen])
        assert len(seen.values) == 4
        layers = {"otrt/distance/net.block1", "otrt/distance/net.block2", "train/otrt"} if weight else set()
        assert set(seen.values[0]) == {"train/distillation", "otrt/weight"} | layers
        assert "train/distillation" in seen.bar

    def test_without_the_option_nothing_is_logged(self):
        seen = Seen()
        fitted([make_callback(), seen])
        assert "train/distillation" not in seen.values[0]

    def test_two_callbacks(self):
        seen = Seen()
        callbacks = [
            make_callback(distillation=0.5),
            make_callback(other_classes(), layers="penultimate", distillation=1),
        ]
        fitted([*callbacks, seen])
        assert {"train/distillation", "train/distillation-2"} <= set(seen.values[0])
        assert seen.values[0]["train/distillation"] != seen.values[0]["train/distillation-2"]

    @pytest.mark.parametrize("weight", [0, 2.0])
    def test_a_schedule_that_is_zero_for_some_steps(self, weight):
        callback = make_callback(weight=weight, distillation=0.5, schedule=lambda step: float(step in (1, 3)))
        seen = Seen()
        with forwards(callback.transfer.teacher.module) as count:
            fitted([callback, seen])
        # A value that is logged stays in the metrics of the Trainer.
        assert ["train/distillation" in values for values in seen.values] == [False, True, True, True]
        assert seen.values[1]["train/distillation"] == seen.values[2]["train/distillation"]
        assert seen.values[2]["train/distillation"] != seen.values[3]["train/distillation"]
        assert len(count) == 5, "the first is traced, and two see how maps lie"

    @pytest.mark.filterwarnings("ignore:The weight of the transfer term was 0 in all 4 training steps")
    def test_a_schedule_of_zero(self):
        callback = make_callback(weight=0, distillation=1.0, schedule=lambda step: 0.0)
        with forwards(callback.transfer.teacher.module) as count:
            found = fitted([callback])
        assert not count
        assert_same(weights(found), weights(fitted([])))


class ReadsTeacher(ValidatedTask):
    """Uses the teacher's output in training, and finds none in validation."""

    transfer: RepresentationTransfer
    outputs: list[Tensor]
    refused = 0

    def loss(self, batch: list[Tensor]) -> Tensor:
        loss = super().loss(batch)
        if self.training:
            self.outputs.append(self.transfer.teacher_output)
        else:
            with pytest.raises(RuntimeError, match="no output of the teacher for the last forward"):
                _ = self.transfer.teacher_output
            self.refused += 1
        return loss


def test_sanity_checks_and_validation():
    callback = make_callback(distillation=1.0)
    task = make_task(ReadsTeacher)
    task.__dict__.update(transfer=callback.transfer, outputs=[])
    trainer = make_trainer(callbacks=[callback], num_sanity_val_steps=2, max_epochs=2, limit_train_batches=3)
    trainer.fit(task, loader(), loader(16))
    assert task.refused == 2 + 2 * 2
    teacher = copy.deepcopy(callback.transfer.teacher.module).eval()
    batches = [batch[0] for batch in loader()][:3]
    torch.testing.assert_close(task.outputs, [teacher(x).detach() for x in (*batches, *batches)])


class TestMonitor:
    @pytest.mark.parametrize("weight", [0, 2.0])
    def test_the_share_of_each_term(self, weight):
        callback, seen = make_callback(weight=weight, distillation=2.0), Seen()
        fitted([callback, OTRTMonitor(every_n_steps=1, validation=False, figures=False), seen])
        values = seen.values[-1]
        assert 0 < values["otrt/distillation_share"] < 1
        assert ("otrt/gradient_share" in values) == (weight > 0)
        assert values["otrt/distillation_share"] + values.get("otrt/gradient_share", 0) < 1

    def test_a_weight_that_is_much_too_large(self):
        callback = make_callback(distillation=1e4)
        monitor = OTRTMonitor(every_n_steps=1, validation=False, figures=False)
        with pytest.warns(
            UserWarning, match=r"gradient of the distillation of logits is .* distillation=\S+ would make"
        ):
            fitted([callback, monitor], task=make_task(lr=1e-9))

    def test_suggest_weight(self):
        task, data = make_task(), [next(iter(loader(batch_size=32)))]
        found = []
        for distillation in (0.0, 2.0, 4.0):
            callback = OTRTCallback(make_teacher(), LAYERS, distillation=distillation, schedule=lambda step: 0.0)
            found.append(suggest_weight(task, callback, data, task_loss=task.loss))
        for each in found[1:]:
            assert each.weight == pytest.approx(found[0].weight, rel=1e-5), "the task is what it is without"
            assert each.task_norms == pytest.approx(found[0].task_norms, rel=1e-4)
        assert not found[0].distillation_norms
        assert "distillation" in str(found[1]).splitlines()[1]
        for name, norm in found[1].distillation_norms.items():
            assert norm > 0
            assert found[2].distillation_norms[name] == pytest.approx(2 * norm, rel=1e-4)


def test_fabric():
    fabric = L.Fabric(accelerator="cpu", devices=1)
    student = make_task().net
    transfer = RepresentationTransfer(make_teacher(), {"block1": "block1"}, weight=0, distillation=1.0)
    model, optimizer = fabric.setup(student, torch.optim.SGD(student.parameters(), lr=0.1))
    start = weights(student)
    with transfer.attached(model):
        for x, y in loader():
            loss = F.cross_entropy(model(x), y) + transfer.loss()
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            assert float(transfer.distillation_value) > 0
    assert any(not torch.equal(start[name], value) for name, value in weights(student).items())


class Encoded(pl.LightningModule):
    """Calls two parts of its network itself."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(4 * 36, 3)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.encoder(batch[0])), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_head_outside_of_the_root_is_an_error():
    """Else features would be taken for logits."""
    callback = OTRTCallback(make_teacher(), {"encoder.1": "block1"}, distillation=1.0)
    with pytest.raises(RuntimeError, match="outside of it: 'head'.*takes what the root returns as logits"):
        make_trainer(callbacks=[callback]).fit(Encoded(), loader())


class Labels(Task):
    """Each sample has several labels."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        targets = F.one_hot(batch[1], 3) + F.one_hot((batch[1] + 1) % 3, 3)
        return F.binary_cross_entropy_with_logits(self.net(batch[0]), targets.float())


class Numbers(Task):
    """A regression."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.smooth_l1_loss(self.net(batch[0])[:, 0], batch[1].float())


class Both(Labels):
    """A classification with another loss beside it."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        return super().loss(batch) + F.cross_entropy(self.net(batch[0]), batch[1])


class TestKindsOfTasks:
    def fit(self, kind: type[Task], option: LogitDistillation) -> tuple[Task, pl.Trainer]:
        task, trainer = make_task(kind), make_trainer(callbacks=[make_callback(weight=0, distillation=option)])
        trainer.fit(task, loader())
        return task, trainer

    @pytest.mark.parametrize("kind", [Labels, Numbers, Both])
    def test_softmax_for_another_task_warns_once(self, kind):
        words = "the task seems to train none"
        with pytest.warns(UserWarning, match=words) as caught:
            self.fit(kind, LogitDistillation())
        assert len([each for each in caught if re.search(words, str(each.message))]) == 1

    @pytest.mark.parametrize(
        ("kind", "option"),
        [
            (Task, LogitDistillation()),
            (Both, LogitDistillation(activation="softmax")),
            (Labels, LogitDistillation(activation="sigmoid")),
            (Numbers, LogitDistillation(features="net.block2")),
        ],
    )
    def test_no_word_where_it_fits(self, kind, option):
        self.fit(kind, option)

    def test_labels_by_hand(self):
        class ByHandLabels(Labels):
            def loss(self, batch: list[Tensor]) -> Tensor:
                logits = self.net(batch[0])
                with torch.no_grad():
                    target = torch.sigmoid(teacher(batch[0]) / 2)
                entropy = F.binary_cross_entropy(target, target)
                term = 4 * (F.binary_cross_entropy_with_logits(logits / 2, target) - entropy)
                targets = F.one_hot(batch[1], 3) + F.one_hot((batch[1] + 1) % 3, 3)
                return F.binary_cross_entropy_with_logits(logits, targets.float()) + 20 * term

        teacher = make_teacher().eval()
        by_hand, plain = make_task(ByHandLabels), make_task(Labels)
        for task in (by_hand, plain):
            make_trainer().fit(task, loader())
        option = LogitDistillation(20.0, temperature=2.0, activation="sigmoid")
        found, _ = self.fit(Labels, option)
        assert_agree(weights(found), weights(by_hand), weights(plain), tolerance=1e-4)  # in float32
