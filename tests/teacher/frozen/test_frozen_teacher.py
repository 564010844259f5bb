"""A teacher runs frozen on the student's inputs, and the user's module comes back as it was given."""

from __future__ import annotations

import copy
import pickle
import re
from collections import UserDict
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import pytorch_lightning
import torch
from teacher.networks import Net, Silent, digest, modes
from torch import Tensor, nn

from lightning_otrt.teacher.frozen.frozen_teacher import Teacher


@dataclass
class Batch:
    """A batch of a data class, as some data sets give."""

    x: Tensor
    name: str


class TestConstructor:
    def test_it_is_no_module(self, net: Net) -> None:
        assert not isinstance(Teacher(net), nn.Module)
        assert Teacher(net).module is net

    @pytest.mark.parametrize("module", ["resnet18", Net, None])
    def test_not_a_module(self, module: Any) -> None:
        with pytest.raises(TypeError, match=r"^Expected `teacher` to be an nn\.Module"):
            Teacher(module)

    @pytest.mark.parametrize("make", [Silent, pytorch_lightning.LightningModule, lambda: nn.ModuleList([nn.ReLU()])])
    def test_no_forward(self, make: Any) -> None:
        with pytest.raises(
            TypeError, match=r"^The teacher \w+ has no `forward` and cannot run\. Define one, or pass the"
        ):
            Teacher(make())

    @pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
    def test_scripts_and_compiled_modules_have_one(self) -> None:
        for module in (torch.jit.script(nn.Linear(4, 2)), torch.jit.freeze(torch.jit.script(nn.Linear(4, 2)).eval())):
            teacher = Teacher(module)
            teacher.prepare("cpu")
            assert teacher(torch.ones(1, 4)).shape == (1, 2)
            teacher.release()
        assert not Teacher(torch.compile(nn.Linear(4, 2), backend="eager"))(torch.ones(1, 4)).requires_grad

    @pytest.mark.parametrize("dtype", ["int8", torch.int64, "bf16-mixed", torch.complex64, "bfloat"])
    def test_unknown_dtype(self, net: Net, dtype: Any) -> None:
        with pytest.raises(
            ValueError, match=r"^Expected `teacher_dtype` to be one of \['float16', .*For mixed precision l"
        ):
            Teacher(net, dtype=dtype)

    def test_inputs_that_cannot_be_called(self, net: Net) -> None:
        with pytest.raises(
            TypeError, match=r"^Expected `teacher_inputs` to be a function of the student's inputs, but go"
        ):
            Teacher(net, inputs="x")  # type: ignore[arg-type]


class TestRunning:
    def test_nothing_of_the_module_changes(self, net: Net) -> None:
        bytes_before, modes_before = digest(net), modes(net)
        wants = [parameter.requires_grad for parameter in net.parameters()]
        objects = [*net.parameters(), *net.buffers()]
        teacher = Teacher(net)
        for _ in range(3):
            teacher.prepare("cpu")
            output = teacher(torch.randn(5, 4))
            assert net.seen == (torch.float32, False, False, False)
            assert not output.requires_grad
            assert not output.is_inference()
            assert modes(net) == modes_before, "what users do with it runs in their mode"
        teacher.release()
        assert (digest(net), modes(net)) == (bytes_before, modes_before)
        assert [parameter.requires_grad for parameter in net.parameters()] == wants
        assert all(a is b for a, b in zip(objects, [*net.parameters(), *net.buffers()], strict=True))

    def test_an_unprepared_call_is_in_evaluation_mode_too(self, net: Net) -> None:
        before = digest(net)
        Teacher(net)(torch.randn(5, 4))
        assert digest(net) == before

    def test_evaluation_mode_holds(self, net: Net) -> None:
        teacher = Teacher(net)
        teacher.prepare("cpu")
        net.eval()
        net.body[2].train()  # below an evaluating top
        teacher(torch.randn(5, 4))
        assert net.seen == (torch.float32, False, False, False)
        assert [name for name, mode in modes(net).items() if mode] == ["body.2"]
        net.train()
        teacher(torch.randn(5, 4))
        assert net.seen == (torch.float32, False, False, False)
        assert all(modes(net).values()), "the last word is the user's"

    def test_a_run_that_fails_leaves_the_modes(self, net: Net) -> None:
        before = modes(net)
        with pytest.raises(RuntimeError):
            Teacher(net)(torch.randn(5, 7))
        assert modes(net) == before

    def test_release_twice_and_again(self, net: Net) -> None:
        before = modes(net)
        teacher = Teacher(net)
        for _ in range(2):
            teacher.release()
            teacher.prepare("cpu")
            teacher(torch.randn(5, 4))
            teacher.release()
            teacher.release()
        assert modes(net) == before

    @pytest.mark.parametrize("outer", [torch.no_grad, torch.enable_grad, torch.inference_mode])
    @pytest.mark.parametrize("fails", [False, True])
    def test_autograd_mode(self, net: Net, outer: Any, fails: bool) -> None:
        def inputs(x: Tensor) -> Tensor:
            torch.set_grad_enabled(True)  # as a careless library might
            if fails:
                raise KeyError("adapter")
            return x

        with outer():
            before = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
            with pytest.raises(RuntimeError, match="KeyError: 'adapter'") if fails else nullcontext():
                Teacher(net, inputs=inputs)(torch.randn(5, 4))
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before

    @pytest.mark.parametrize(
        ("inputs", "words"),
        [
            (
                lambda x, y: x,
                r"\(.*<lambda>\) failed on \(float32 \(5, 4\)\), the inputs of the student's root\. Type",
            ),
            (
                lambda x: x - torch.zeros(4, device="meta"),
                "RuntimeError: .*Tensors of its own have to be on the device",
            ),
        ],
    )
    def test_inputs_that_fail(self, net: Net, inputs: Any, words: str) -> None:
        with pytest.raises(RuntimeError, match=words):
            Teacher(net, inputs=inputs)(torch.randn(5, 4))

    def test_outer_autocast(self, net: Net) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            assert Teacher(net.head)(torch.randn(5, 3)).dtype == torch.bfloat16

    def test_module_is_called_with_its_hooks(self, net: Net) -> None:
        seen = []
        net.register_forward_hook(lambda *_: seen.append(1))
        Teacher(net)(torch.randn(5, 4))
        assert seen == [1]

    def test_a_module_without_parameters(self) -> None:
        teacher = Teacher(nn.Flatten())
        teacher.prepare("meta")
        assert teacher(torch.ones(2, 3, 4)).shape == (2, 12)
        teacher.check_against(nn.Flatten())

    @pytest.mark.parametrize("dtype", [None, torch.float64])
    def test_compiled_student(self, net: Net, dtype: Any) -> None:
        student = copy.deepcopy(net.body)
        teacher = Teacher(net.body, inputs=lambda x: 2 * x, dtype=dtype)
        kept: list[Tensor] = []

        def run_teacher(_: nn.Module, args: tuple[Any, ...]) -> None:
            teacher.prepare("cpu")
            kept.append(teacher(*args))

        student.register_forward_pre_hook(run_teacher)
        teacher.prepare("cpu")
        compiled = torch.compile(student, backend="eager", fullgraph=True)
        x = torch.randn(5, 4)
        assert compiled(x).requires_grad
        torch.testing.assert_close(kept[-1], teacher(x))
        assert not kept[-1].requires_grad


class TestInputs:
    @pytest.mark.parametrize(
        ("inputs", "factor"),
        [
            (lambda x, scale: x, 1.0),
            (lambda x, scale: (x, scale), 3.0),
            (lambda x, scale: {"scale": 2 * scale, "x": x}, 6.0),
            (None, 3.0),
        ],
    )
    def test_forms(self, net: Net, inputs: Any, factor: float) -> None:
        x = torch.randn(5, 4)
        torch.testing.assert_close(Teacher(net, inputs=inputs)(x, scale=3.0), factor * Teacher(net)(x))

    def test_other_returns(self, net: Net) -> None:
        expected = (
            "Expected `teacher_inputs` to return a tensor, a tuple of positional arguments or a dict of keywords, but "
            "got list. A list is one argument of the teacher: return it in a tuple, `(images,)`."
        )
        with pytest.raises(TypeError, match=f"^{re.escape(expected)}$"):
            Teacher(net, inputs=lambda x: [x])(torch.ones(1, 4))


class TestDtype:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16", "bf16", "bf16-true"])
    def test_runs_as_a_copy(self, net: Net, dtype: Any) -> None:
        before, modes_before = digest(net), modes(net)
        teacher = Teacher(net, dtype=dtype)
        teacher.prepare("cpu")
        running = teacher.module
        output = teacher(torch.randn(5, 4), scale={"a": [torch.ones(1)]}["a"][0])
        assert running is not net
        assert teacher.module is running
        assert output.dtype == torch.bfloat16
        assert running.seen == (torch.bfloat16, False, False, False)
        assert modes(net) == modes_before
        assert not running.head.weight.requires_grad
        assert running.body[1].num_batches_tracked.dtype == torch.int64
        teacher.release()
        assert (digest(net), modes(net)) == (before, modes_before)

    def test_containers_and_whole_numbers(self) -> None:
        """Floating-point tensors are cast wherever they are: in lists, mappings of any class, data classes."""
        teacher = Teacher(nn.Identity(), dtype="16-true")
        x, tokens = torch.ones(1), torch.arange(3)
        args, kwargs = teacher.inputs_for(([{"x": x}], UserDict(x=x), Batch(x, "name"), tokens), {"mask": x})
        assert args[0][0]["x"].dtype == args[1]["x"].dtype == args[2].x.dtype == kwargs["mask"].dtype == torch.float16
        assert isinstance(args[1], UserDict)
        assert args[2].name == "name"
        assert args[3] is tokens
        assert x.dtype == torch.float32

    def test_same_dtype_is_no_copy(self, net: Net) -> None:
        teacher = Teacher(net, dtype="32-true")
        assert teacher.module is net
        assert teacher(torch.randn(5, 4, dtype=torch.float64)).dtype == torch.float32

    def test_follows_the_student(self, net: Net) -> None:
        before, modes_before = digest(net), modes(net)
        teacher = Teacher(net)
        teacher.prepare("cpu")
        assert teacher.module is net
        teacher.follow(torch.float64)
        assert modes(net) == modes_before
        running = teacher.module
        teacher.follow(torch.float64)
        teacher.prepare("cpu")
        assert teacher.module is running is not net
        assert teacher(torch.randn(5, 4)).dtype == torch.float64
        teacher.follow(None)
        teacher.prepare("cpu")
        assert teacher.module is net
        teacher.release()
        assert (digest(net), modes(net)) == (before, modes_before)

    def test_its_own_goes_first(self, net: Net) -> None:
        teacher = Teacher(net, dtype="bfloat16")
        teacher.follow(torch.float64)
        teacher.prepare("cpu")
        assert teacher(torch.randn(5, 4)).dtype == torch.bfloat16


class TestCopies:
    def test_deepcopy_does_not_drag_the_module_along(self, net: Net) -> None:
        teacher = Teacher(net)
        task = nn.Linear(1, 1)
        task.engine = teacher
        assert copy.deepcopy(task).engine is teacher

    @pytest.mark.parametrize("dtype", [None, torch.bfloat16])
    @pytest.mark.parametrize("prepared", [True, False])
    def test_pickle(self, net: Net, dtype: Any, prepared: bool) -> None:
        before, modes_before = digest(net), modes(net)
        teacher = Teacher(net, inputs=torch.neg, dtype=dtype)
        if prepared:
            teacher.prepare("cpu")
        twin = pickle.loads(pickle.dumps(teacher))
        x = torch.randn(5, 4)
        torch.testing.assert_close(twin(x), teacher(x))
        twin.release()
        assert twin.checksum() == teacher.checksum()
        if dtype is None:
            assert twin.module is not net
            assert (digest(twin.module), modes(twin.module)) == (before, modes_before)
