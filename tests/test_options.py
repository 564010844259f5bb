"""One signature: the options of a transfer, the same for callback, wrapper and plain loop, and all of them heard."""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any, get_type_hints

import lightning.pytorch as pl
import pytest
import torch
from helpers import LAYERS, Net, Task, assert_same, loader, make_task, make_teacher, make_trainer, weights
from torch import Tensor, nn

from lightning_otrt import (
    CosineDecay,
    LayerPair,
    LinearWarmup,
    LogitDistillation,
    OTRTCallback,
    OTRTModule,
    RepresentationTransfer,
    TeacherCache,
    TransferWarning,
)
from lightning_otrt.options import OPTIONS, TransferOptions

PARAMETERS = inspect.signature(RepresentationTransfer).parameters
#: The options that callback and wrapper hand on.
SHARED = [name for name, p in PARAMETERS.items() if p.kind is p.KEYWORD_ONLY and name != "process_group"]


def shifted(y: Tensor, x: Tensor) -> Tensor:
    return torch.cdist(y, x) + 1


def same(x: Tensor) -> Tensor:
    return x


#: For each option values that are not its default.
VALUES: dict[str, list[Any]] = {
    "layers": ["blocks", -2, {"net.block1": "block1"}, [("a", "b"), "c"], LayerPair("a", "b", 2.0, (1, -1), "out")],
    "weight": [2.0, 0],
    "student_root": ["net", ""],
    "cost": ["euclidean", shifted],
    "plan": ["exact", "random", "orthogonal", "random_orthogonal", "auto"],
    "epsilon": [0.05],
    "memory": [0.9, 0],
    "solve_every": [1],
    "grid": [2, None],
    "schedule": [LinearWarmup(5), CosineDecay(3, final=0.1)],
    "distillation": [0.5, LogitDistillation(0.5, temperature=2.0, select=("logits", None))],
    "teacher_inputs": [same],
    "teacher_dtype": ["bf16-true", torch.float16],
    "teacher_cache": ["memory", "4GB", TeacherCache(limit="1MB", dtype="bfloat16")],
    "global_batch": [True, False],
    "strict": [False],
    "seed": [3],
}
CASES = [(name, value) for name, values in VALUES.items() for value in values]


def make(**options: Any) -> list[Any]:
    """All three ways in with these options; the third is what the wrapper shows."""
    wrapped: Any = OTRTModule(make_task(), make_teacher(), **options)
    return [RepresentationTransfer(make_teacher(), **options), OTRTCallback(make_teacher(), **options), wrapped.otrt]


class TestSignature:
    def test_every_option_has_a_type_and_a_description(self):
        assert list(TransferOptions.__annotations__) == SHARED
        assert set(OPTIONS) == set(PARAMETERS)
        assert set(VALUES) == {"layers", *SHARED}, "a new option belongs into the tests"
        assert get_type_hints(TransferOptions) == {
            name: kind for name, kind in get_type_hints(RepresentationTransfer.__init__).items() if name in SHARED
        }
        for name in OPTIONS:
            assert f"\n    {name}: " in inspect.getdoc(RepresentationTransfer), name

    @pytest.mark.parametrize(("function", "own"), [(OTRTCallback, []), (OTRTModule, ["task"])])
    def test_shown_at_run_time(self, function, own):
        found = inspect.signature(function).parameters
        assert list(found) == [*own, "teacher", "layers", *SHARED]
        for name in ("layers", *SHARED):
            assert found[name].default == PARAMETERS[name].default
            assert found[name].kind == PARAMETERS[name].kind
        doc = (function.__init__ if not own else function.__new__).__doc__
        assert [name for name in [*own, *SHARED] if f"    {name}: " not in doc] == []
        assert "process_group" not in doc

    @pytest.mark.parametrize("way", [OTRTCallback, lambda teacher, **options: OTRTModule(Task(), teacher, **options)])
    def test_no_process_group_and_no_other_name(self, way):
        for name in ("process_group", "wieght"):
            with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'") as error:
                way(make_teacher(), **{name: None})
            if name == "process_group":
                assert "strategy" in str(error.value)


TYPED = """
from torch import nn
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning_otrt import LinearWarmup, OTRTCallback, OTRTModule, RepresentationTransfer

teacher = nn.Linear(2, 2)
callback = OTRTCallback(teacher, "blocks", weight=3, schedule=LinearWarmup(3))
callback.weight += 1
ready: OTRTModule = OTRTModule(BoringModel(), RepresentationTransfer("resnet18"))
weight: float = ready.otrt.weight
OTRTCallback(teacher, wieght=3)
OTRTModule(BoringModel(), teacher, weight="3")
OTRTCallback(teacher, process_group=None)
callback.weight = "3"
print(callback.wieght)
"""


@pytest.mark.slow
def test_type_checkers_see_the_options(tmp_path):
    """As editors do: the first lines are right, and each of the others has its error."""
    api = pytest.importorskip("mypy.api")
    path = tmp_path / "typed.py"
    path.write_text(TYPED)
    told, _, _ = api.run(["--strict", "--ignore-missing-imports", str(path), f"--cache-dir={tmp_path / 'cache'}"])
    wrong = [
        line.startswith(("OTRTCallback(", "OTRTModule(", 'callback.weight = "', "print(")) for line in TYPED.split("\n")
    ]
    found = [int(number) for number in re.findall(r"typed\.py:(\d+): error", told)]
    assert found == [number for number, is_wrong in enumerate(wrong, 1) if is_wrong], told
    assert 'did you mean "weight"' in told


class TestRepr:
    @pytest.mark.parametrize(("name", "value"), CASES)
    def test_is_the_constructor_call(self, name, value):
        for original in make(**{name: value}):
            text = repr(original)
            assert text.startswith(f"{type(original).__name__}(Net(...), ")
            names = {**globals(), "Net": lambda _: make_teacher()}
            again = eval(text, names)
            assert type(again) is type(original)
            assert repr(again) == text
            for option in ("layers", *SHARED):
                assert getattr(again, option) == getattr(original, option), option

    def test_defaults_are_left_out(self):
        assert [repr(each) for each in make()] == [
            "RepresentationTransfer(Net(...))",
            "OTRTCallback(Net(...))",
            "RepresentationTransfer(Net(...))",
        ]
        assert repr(OTRTCallback(make_teacher(), weight=32, layers="auto", seed=0)) == "OTRTCallback(Net(...))"

    @pytest.mark.parametrize(
        ("teacher", "text"),
        [
            ("resnet18:None", "'resnet18:None'"),
            (("resnet18", None), "('resnet18', None)"),
            (nn.Sequential(nn.Linear(2, 2)), "Sequential(...)"),
        ],
    )
    def test_teachers(self, teacher, text):
        assert repr(OTRTCallback(teacher, weight=2.0)) == f"OTRTCallback({text}, weight=2.0)"

    def test_shows_what_was_set_later(self):
        callback = OTRTCallback(make_teacher())
        callback.weight = 3
        assert repr(callback) == "OTRTCallback(Net(...), weight=3)"

    def test_a_class_of_a_user(self):
        class Mine(OTRTCallback):
            pass

        assert repr(Mine(make_teacher(), "blocks")) == "Mine(Net(...), 'blocks')"


class TestAttributes:
    @pytest.mark.parametrize(("name", "value"), CASES)
    def test_are_what_was_given(self, name, value):
        for each in make(**{name: value}):
            assert getattr(each, name) == value

    def test_a_callback_has_the_options_and_the_transfer_alone(self):
        callback = OTRTCallback(make_teacher())
        own = {name for name in dir(callback) if not name.startswith("_")} - {*dir(pl.Callback)}
        assert own == {"transfer"}
        for name in ("pairs", "distances", "cache", "loss", "discard"):
            with pytest.raises(
                AttributeError, match=rf"no attribute '{name}'. Its transfer has it: `callback.transfer"
            ):
                getattr(callback, name)
        with pytest.raises(AttributeError, match="no attribute 'wieght'$"):
            callback.wieght  # noqa: B018

    @pytest.mark.parametrize("name", [name for name in OPTIONS if name not in ("weight", "schedule")])
    def test_a_fixed_option_cannot_be_set(self, name):
        value = VALUES.get(name, [None])[0]
        for each in make():
            before = getattr(each, name)
            with pytest.raises(AttributeError, match=f"`{name}` of a .* cannot be changed.*Make a new one") as error:
                setattr(each, name, value)
            assert "'weight' and 'schedule'" in str(error.value)
            assert getattr(each, name) is before

    @pytest.mark.parametrize(
        ("name", "value", "error"),
        [("weight", -1, ValueError), ("weight", "3", TypeError), ("schedule", 0.5, TypeError)],
    )
    def test_what_is_set_is_checked(self, name, value, error):
        for each in make():
            with pytest.raises(error, match=f"`{name}`"):
                setattr(each, name, value)
            assert getattr(each, name) == PARAMETERS[name].default

    def test_no_other_attribute_is_an_option(self):
        callback = OTRTCallback(make_teacher())
        with pytest.raises(AttributeError, match="'OTRTCallback' object has no attribute 'wieght'"):
            _ = callback.wieght
        assert not hasattr(callback, "current_weights")
        callback.mine = 1
        assert not hasattr(callback.transfer, "mine")

    @pytest.mark.parametrize("name", ["wieght", "weigth", "shedule", "layer", "solve_evry"])
    def test_a_misspelt_option_cannot_be_set(self, name):
        """It would have no effect. Other attributes may be set: a subclass has some of its own."""
        for each in make():
            each.name_of_the_run = "first"
            with pytest.raises(AttributeError, match=f"has no option '{name}'. Did you mean"):
                setattr(each, name, 1)
            assert not hasattr(each, name)

    @pytest.mark.parametrize("name", ["step", "cuda_graphs", "report", "check_every"])
    def test_what_a_transfer_has_is_not_set_on_its_callback(self, name):
        callback = OTRTCallback(make_teacher())
        with pytest.raises(AttributeError, match=f"Its transfer has it: `callback.transfer.{name}`"):
            setattr(callback, name, 0)

    def test_a_subclass_has_attributes_of_any_name(self):
        class Mine(OTRTCallback):
            def __init__(self, teacher, **options):
                super().__init__(teacher, **options)
                self.step, self.scheduler, self.labels = 0, None, []

        class Mixed(RepresentationTransfer):
            def __init__(self, teacher, *, scheduler=None, **options):
                super().__init__(teacher, **options)
                self.scheduler = scheduler

        assert Mine(make_teacher(), weight=2.0).weight == 2.0
        assert repr(Mixed(make_teacher(), weight=2.0)) == "Mixed(Net(...), weight=2.0)"

        class Early(OTRTCallback):
            def __init__(self, teacher):
                self.weight = 3.0
                super().__init__(teacher)

        with pytest.raises(AttributeError, match=r"`weight` is an option of the transfer. Call `super\(\).__init__"):
            Early(make_teacher())

    def test_there_are_no_shallow_copies(self):
        """They would share their plans and their weights."""
        transfer = make()[0]
        with pytest.raises(TypeError, match=r"no shallow copies. Use `copy.deepcopy`"):
            copy.copy(transfer)
        assert copy.deepcopy(transfer).weight == transfer.weight

    @pytest.mark.parametrize("name", OPTIONS)
    def test_help_shows_them(self, name):
        text = inspect.getdoc(getattr(RepresentationTransfer, name))
        last = "It may be set at any time." if name in ("weight", "schedule") else "It cannot be changed."
        assert text == f"The argument ``{name}``. {last}"

    def test_set_in_a_plain_loop(self):
        """Also between a forward and the next: what is recorded follows at once."""
        student, transfer = Net(), RepresentationTransfer(make_teacher(), {"block1": "block1"}, weight=0)
        x = torch.randn(8, 1, 8, 8)
        with transfer.attached(student):
            student(x)
            assert transfer.loss().item() == 0
            assert not transfer.distances
            transfer.weight = 2.0
            student(x)
            assert float(transfer.loss().detach()) == 2 * float(transfer.distances[0].value)
            transfer.schedule = lambda step: 0.0
            student(x)
            assert not transfer.has_views
            transfer.schedule = None
            student(x)
            assert float(transfer.loss().detach()) > 0


class Setting(pl.Callback):
    """Sets an option after the second step."""

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step == 2:
            (callback,) = (each for each in trainer.callbacks if isinstance(each, OTRTCallback))
            setattr(callback, self.name, self.value)


class Weights(pl.Callback):
    """Notes the logged weight of the term."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.seen.append(float(trainer.callback_metrics["otrt/weight"]))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("weight", 3, [2.0, 2.0, 3.0, 3.0]), ("weight", 0, [2.0, 2.0, 0.0, 0.0]), ("schedule", LinearWarmup(8), None)],
)
def test_set_during_a_fit(name, value, expected):
    callback, noted = OTRTCallback(make_teacher(), LAYERS, weight=2.0), Weights()
    make_trainer(callbacks=[callback, Setting(name, value), noted]).fit(make_task(), loader())
    assert noted.seen == (expected or [2.0, 2.0, 2 * 3 / 8, 2 * 4 / 8])


def test_a_fixed_option_set_during_a_fit_is_an_error():
    callback = OTRTCallback(make_teacher(), LAYERS)
    with pytest.raises(AttributeError, match="`solve_every` of a RepresentationTransfer cannot be changed"):
        make_trainer(callbacks=[callback, Setting("solve_every", 1)]).fit(make_task(), loader())


class TestSetBetweenForwardAndLoss:
    """What ran with a weight of 0 was not read, so no term can be formed from it: an error, and not a term of 0."""

    @pytest.mark.parametrize("distillation", [0.0, 1.0])
    @pytest.mark.parametrize("name", ["weight", "schedule", "step"])
    def test_is_an_error(self, name, distillation):
        options: dict[str, Any] = {"schedule": lambda step: step} if name == "step" else {"weight": 0.0}
        if name == "schedule":
            options = {"schedule": lambda step: 0.0}
        transfer, student = (
            RepresentationTransfer(make_teacher(), ["block1", "block2"], distillation=distillation, **options),
            Net(),
        )
        (x, _), *_ = loader()
        with transfer.attached(student):
            student(x)
            setattr(transfer, name, {"weight": 1.0, "schedule": None, "step": 2}[name])
            with pytest.raises(RuntimeError, match="the forward"):
                transfer.loss()
            student(x)
            assert transfer.loss() > 0
            assert transfer.transport_value > 0

    def test_not_strict_it_is_left_out_with_a_warning(self):
        options: dict[str, Any] = {"weight": 0.0, "distillation": 1.0, "strict": False}
        transfer, student = RepresentationTransfer(make_teacher(), ["block1", "block2"], **options), Net()
        (x, _), *_ = loader()
        with transfer.attached(student):
            student(x)
            transfer.weight = 1.0
            with pytest.warns(TransferWarning, match="was 0 when the student ran"):
                loss = transfer.loss()
            assert loss == transfer.distillation_value > 0
            assert transfer.transport_value is None
            student(x)
            assert transfer.loss() > 0


class TestReadyTransfer:
    def fit(self, way: str, ready: bool) -> dict[str, Tensor]:
        options: dict[str, Any] = {"layers": LAYERS, "weight": 2.0, "solve_every": 2}
        first: Any = RepresentationTransfer(make_teacher(), **options) if ready else make_teacher()
        rest = {} if ready else options
        task = make_task()
        if way == "callback":
            make_trainer(callbacks=[OTRTCallback(first, **rest)]).fit(task, loader())
        else:
            make_trainer().fit(OTRTModule(task, first, **rest), loader())
        return weights(task)

    @pytest.mark.parametrize("way", ["callback", "wrapper"])
    def test_in_place_of_the_teacher(self, way):
        assert_same(self.fit(way, True), self.fit(way, False))

    def test_it_is_the_same_object(self):
        transfer = RepresentationTransfer(make_teacher(), LAYERS)
        transfer.report = (lines := []).append
        assert OTRTCallback(transfer).transfer is transfer
        assert OTRTModule(make_task(), transfer).otrt is transfer
        make_trainer(callbacks=[OTRTCallback(transfer)]).fit(make_task(), loader())
        assert len(lines) == 1, "the user's own place for the table of layers is kept"

    @pytest.mark.parametrize(
        ("options", "names"), [({"layers": "blocks"}, ["layers"]), ({"weight": 8.0, "seed": 1}, ["weight", "seed"])]
    )
    @pytest.mark.parametrize("way", [OTRTCallback, lambda *args, **options: OTRTModule(make_task(), *args, **options)])
    def test_options_beside_it_are_refused(self, way, options, names):
        with pytest.raises(TypeError, match="beside a RepresentationTransfer") as error:
            way(RepresentationTransfer(make_teacher()), **options)
        assert all(repr(name) in str(error.value) for name in names)

    def test_a_process_group_is_refused(self):
        with pytest.raises(ValueError, match=r"without `process_group`.*strategy"):
            OTRTCallback(RepresentationTransfer(make_teacher(), process_group=object()))
