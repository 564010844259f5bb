"""Teachers: what is accepted, how it runs, and that the user's module comes back as it was given."""

from __future__ import annotations

import copy
import hashlib
import pickle
import re
from pathlib import Path
from typing import Any

import lightning
import pytest
import pytorch_lightning
import torch
from torch import Tensor, nn

from lightning_otrt.teacher.frozen import Teacher
from lightning_otrt.teacher.load import load_teacher


class Net(nn.Module):
    """A module with every kind of state, at module level so that it pickles."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.5))
        self.head = nn.Linear(width, 2)
        self.seen: Any = None

    def forward(self, x: Tensor, scale: Any = 1.0) -> Tensor:
        self.seen = (x.dtype, self.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        return self.head(self.body(x)) * scale


class Lit(lightning.LightningModule):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Net(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Silent(lightning.LightningModule):
    """A LightningModule without a forward of its own."""


def digest(module: nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def flags(module: nn.Module) -> dict[str, bool]:
    return {name: inner.training for name, inner in module.named_modules()}


@pytest.fixture
def net() -> Net:
    """A teacher in mixed modes with mixed ``requires_grad``."""
    torch.manual_seed(0)
    net = Net()
    net.body[1].eval()
    net.head.eval()
    net.head.weight.requires_grad_(False)
    net.body[1](torch.randn(8, 3))
    return net


class TestLoadTeacher:
    @pytest.mark.parametrize("make", [Net, Lit])
    def test_a_module_is_returned_as_it_is(self, make: Any) -> None:
        module = make()
        before = flags(module)
        assert load_teacher(module) is module
        assert flags(module) == before

    def test_a_module_of_the_other_lightning_package_is_a_module(self) -> None:
        class Other(pytorch_lightning.LightningModule):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * x

        module = load_teacher(Other())
        assert Teacher(module)(torch.ones(1)) == 2

    @pytest.mark.parametrize("extra", [{"model_class": Net}, {"width": 3}, {"weights": "IMAGENET1K_V1"}])
    def test_arguments_that_a_module_has_no_use_for(self, extra: dict[str, Any]) -> None:
        with pytest.raises(
            TypeError, match=rf"^\['{next(iter(extra))}'\] would have no effect on the teacher Net; leave"
        ):
            load_teacher(Net(), **extra)

    @pytest.mark.parametrize("source", [3, None, torch.relu, ("a", "b", "c"), [Net(), None], b"resnet18"])
    def test_other_objects(self, source: Any) -> None:
        with pytest.raises(
            TypeError, match=r"Expected `teacher` to be an nn\.Module \(a LightningModule is one\), the na"
        ):
            load_teacher(source)

    def test_a_class_and_an_object_of_the_other_package(self) -> None:
        with pytest.raises(TypeError, match=r"but got the class Net \(pass an instance\)\.$"):
            load_teacher(Net)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"of type pytorch_lightning\.core\.datamodule\.LightningDataModule\.$"):
            load_teacher(pytorch_lightning.LightningDataModule())


class TestTorchvision:
    @pytest.mark.parametrize(
        "source", ["resnet18", "ResNet18", "resnet18:None", ("resnet18", None), ["resnet18", None]]
    )
    def test_untrained(self, source: Any) -> None:
        weights = {"weights": None} if isinstance(source, str) and ":" not in source else {}
        model = load_teacher(source, num_classes=7, **weights)
        assert type(model).__name__ == "ResNet"
        assert model.fc.out_features == 7

    @pytest.mark.parametrize(
        ("source", "options", "expected"),
        [
            ("resnet50", {}, "DEFAULT"),
            ("resnet50", {"weights": "IMAGENET1K_V2"}, "IMAGENET1K_V2"),
            ("resnet50:IMAGENET1K_V2", {}, "IMAGENET1K_V2"),
            (("resnet50", "ResNet50_Weights.IMAGENET1K_V1"), {}, "ResNet50_Weights.IMAGENET1K_V1"),
        ],
    )
    def test_weights(self, source: Any, options: Any, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from torchvision import models

        asked = []
        monkeypatch.setattr(models, "get_model", lambda name, weights: asked.append((name, weights)) or Net())
        load_teacher(source, **options)
        assert asked == [("resnet50", expected)]

    def test_enum(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from torchvision import models

        asked = []
        monkeypatch.setattr(models, "get_model", lambda name, weights: asked.append(weights) or Net())
        load_teacher("resnet18", weights=models.ResNet18_Weights.IMAGENET1K_V1)
        load_teacher(("resnet18", models.ResNet18_Weights.IMAGENET1K_V1))
        assert asked == [models.ResNet18_Weights.IMAGENET1K_V1] * 2

    def test_unknown_name(self) -> None:
        expected = "No torchvision model and no file is called 'resnet5'. Did you mean 'resnet50' or "
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}"):
            load_teacher("resnet5")
        with pytest.raises(ValueError, match=r"is called 'microsoft/%%'\. A teacher is an nn\.Module"):
            load_teacher("microsoft/%%")

    @pytest.mark.parametrize("source", ["resnet50:IMAGENET21K", ("resnet50", "IMAGENET21K")])
    def test_unknown_weights(self, source: Any) -> None:
        expected = (
            "'resnet50' has no weights 'IMAGENET21K'. Choose from ['IMAGENET1K_V1', 'IMAGENET1K_V2', 'DEFAULT'], or "
            "None for an untrained network."
        )
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
            load_teacher(source)

    def test_arguments_without_effect(self) -> None:
        with pytest.raises(TypeError, match=r"^\['weights'\] would have no effect on the teacher 'resnet18:DEFAULT';"):
            load_teacher("resnet18:DEFAULT", weights="IMAGENET1K_V1")
        with pytest.raises(TypeError, match=r"^\['model_class'\] would have no effect on the teacher 'resnet18';"):
            load_teacher("resnet18", model_class=Net)

    def test_without_torchvision(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
        with pytest.raises(
            ImportError, match=r"^The teacher 'resnet18' needs torchvision: `pip install torchvision`\.$"
        ):
            load_teacher("resnet18")


class TestCheckpoint:
    @pytest.mark.parametrize("wrapped", [True, False])
    @pytest.mark.parametrize("form", [str, Path])
    def test_state_dict(self, wrapped: bool, form: Any, tmp_path: Path) -> None:
        path = tmp_path / "teacher.pt"
        saved = Net(5)
        torch.save({"state_dict": saved.state_dict(), "epoch": 3} if wrapped else saved.state_dict(), path)
        assert digest(load_teacher(form(path), model_class=Net, width=5)) == digest(saved)
        assert digest(load_teacher((form(path), lambda: Net(5)))) == digest(saved)

    def test_any_existing_file(self, tmp_path: Path) -> None:
        path = tmp_path / "weights.bin"
        torch.save(Net().state_dict(), path)
        assert isinstance(load_teacher(str(path), model_class=Net), Net)

    def test_lightning_checkpoint(self, tmp_path: Path) -> None:
        path = tmp_path / "teacher.ckpt"
        trainer = lightning.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", max_steps=0)
        task = Lit(width=6)
        trainer.strategy.connect(task)
        trainer.save_checkpoint(path, weights_only=True)
        loaded = load_teacher(path, model_class=Lit)
        assert loaded.hparams["width"] == 6
        assert digest(loaded) == digest(task)
        with pytest.raises(
            ValueError, match=r"The names in the file begin with 'net\.': pass the class that holds this"
        ):
            load_teacher(path, model_class=Net, width=6)

    def test_no_class(self, tmp_path: Path) -> None:
        expected = (
            "The checkpoint 'a.ckpt' holds weights, not the network: expected its class as `model_class`, but got "
            "None. Pass load_teacher('a.ckpt', model_class=MyModule), or ('a.ckpt', MyModule) as the teacher."
        )
        with pytest.raises(TypeError, match=f"^{re.escape(expected)}$"):
            load_teacher("a.ckpt")
        with pytest.raises(TypeError, match=r"as `model_class`, but got Net\."):
            load_teacher(("a.ckpt", Net()))

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(
            FileNotFoundError, match=r"^There is no checkpoint file '.*/a\.pth' to load the teacher from\.$"
        ):
            load_teacher(tmp_path / "a.pth", model_class=Net)

    def test_keys_that_do_not_fit(self, tmp_path: Path) -> None:
        path = tmp_path / "a.pt"
        torch.save({f"other{i}": torch.ones(1) for i in range(7)}, path)
        expected = (
            f"The weights in {str(path)!r} do not fit Net. Missing: 'body.0.weight', 'body.0.bias', 'body.1.weight', "
            "'body.1.bias', 'body.1.running_mean' and 3 more. Unexpected: 'other0', 'other1', 'other2', 'other3', "
            "'other4' and 2 more."
        )
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
            load_teacher(path, model_class=Net)

    def test_shapes_that_do_not_fit(self, tmp_path: Path) -> None:
        torch.save(Net(5).state_dict(), tmp_path / "a.pt")
        with pytest.raises(
            ValueError, match=r"a\.pt' do not fit Net: Error\(s\) in loading[\s\S]*size mismatch for body\.0"
        ):
            load_teacher(tmp_path / "a.pt", model_class=Net)

    def test_no_state_dict(self, tmp_path: Path) -> None:
        torch.save(torch.ones(2), tmp_path / "a.pt")
        with pytest.raises(ValueError, match=r"expected a state dict, alone or as 'state_dict', but got Tensor\.$"):
            load_teacher(tmp_path / "a.pt", model_class=Net)

    @pytest.mark.parametrize("model_class", [Net, Lit])
    def test_a_pickled_module_is_refused(self, model_class: Any, tmp_path: Path) -> None:
        path = tmp_path / "a.pt"
        torch.save(Net(), path)
        expected = f"The checkpoint {str(path)!r} could not be read (Unsupported global: GLOBAL "
        with pytest.raises(RuntimeError, match=f"^{re.escape(expected)}.*If you trust the file, load the teacher with"):
            load_teacher(path, model_class=model_class)

    @pytest.mark.parametrize("content", [b"", b"hello"])
    def test_a_damaged_file(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "a.pt").write_bytes(content)
        with pytest.raises(RuntimeError, match=r"could not be read \((EOF|Key)Error.*\)\. Either it is damaged or of"):
            load_teacher(tmp_path / "a.pt", model_class=Net)


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
        bytes_before, flags_before = digest(net), flags(net)
        wants = [parameter.requires_grad for parameter in net.parameters()]
        objects = [*net.parameters(), *net.buffers()]
        teacher = Teacher(net)
        for _ in range(3):
            teacher.prepare("cpu")
            output = teacher(torch.randn(5, 4))
            assert net.seen == (torch.float32, False, False, False)
            assert not output.requires_grad
            assert not output.is_inference()
        assert not any(flags(net).values())
        teacher.release()
        assert (digest(net), flags(net)) == (bytes_before, flags_before)
        assert [parameter.requires_grad for parameter in net.parameters()] == wants
        assert all(a is b for a, b in zip(objects, [*net.parameters(), *net.buffers()], strict=True))

    def test_an_unprepared_call_is_in_evaluation_mode_too(self, net: Net) -> None:
        before = digest(net)
        Teacher(net)(torch.randn(5, 4))
        assert digest(net) == before

    def test_evaluation_mode_holds(self, net: Net) -> None:
        before = flags(net)
        teacher = Teacher(net)
        teacher.prepare("cpu")
        net.train()
        teacher.prepare("cpu")
        assert not any(flags(net).values())
        net.body[2].train()  # below an evaluating top
        teacher(torch.randn(5, 4))
        assert not any(flags(net).values())
        teacher.release()
        assert flags(net) == before

    def test_modes_are_set_without_eval(self) -> None:
        class Merging(nn.Linear):
            def train(self, mode: bool = True) -> Merging:
                raise AssertionError("merges weights")

        teacher = Teacher(Merging(4, 2))
        teacher.prepare("cpu")
        teacher.release()

    @pytest.mark.parametrize("first", [0, 1])
    def test_two_teachers_of_one_module(self, net: Net, first: int) -> None:
        before = flags(net)
        teachers = [Teacher(net), Teacher(net)]
        for teacher in teachers:
            teacher.prepare("cpu")
        teachers[first].release()
        teachers[1 - first].release()
        assert flags(net) == before

    def test_release_twice_and_again(self, net: Net) -> None:
        before = flags(net)
        teacher = Teacher(net)
        teacher.release()
        teacher.prepare("cpu")
        teacher.release()
        net.train()
        teacher.release()
        assert all(flags(net).values())
        for name, flag in before.items():
            net.get_submodule(name).training = flag
        teacher.prepare("cpu")
        assert not any(flags(net).values())
        teacher.release()
        assert flags(net) == before

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
            try:
                Teacher(net, inputs=inputs)(torch.randn(5, 4))
            except KeyError:
                assert fails
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before

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

    def test_compiled_student(self, net: Net) -> None:
        student = copy.deepcopy(net.body)
        teacher = Teacher(net.body, inputs=lambda x: 2 * x)
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
        before, modes = digest(net), flags(net)
        teacher = Teacher(net, dtype=dtype)
        teacher.prepare("cpu")
        running = teacher.module
        output = teacher(torch.randn(5, 4), scale={"a": [torch.ones(1)]}["a"][0])
        assert running is not net
        assert teacher.module is running
        assert output.dtype == torch.bfloat16
        assert running.seen == (torch.bfloat16, False, False, False)
        assert flags(net) == modes
        assert not running.head.weight.requires_grad
        assert running.body[1].num_batches_tracked.dtype == torch.int64
        teacher.release()
        assert (digest(net), flags(net)) == (before, modes)

    def test_nested_and_whole_number_inputs(self) -> None:
        class Echo(nn.Module):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return args, kwargs

        tokens = torch.arange(3)
        (nested, kept), named = Teacher(Echo(), dtype="16-true")([{"x": torch.ones(1)}], tokens, mask=torch.ones(1))
        assert nested[0]["x"].dtype == named["mask"].dtype == torch.float16
        assert kept is tokens

    def test_same_dtype_is_no_copy(self, net: Net) -> None:
        teacher = Teacher(net, dtype="32-true")
        assert teacher.module is net
        assert teacher(torch.randn(5, 4, dtype=torch.float64)).dtype == torch.float32

    def test_follows_the_student(self, net: Net) -> None:
        before, modes = digest(net), flags(net)
        teacher = Teacher(net)
        teacher.prepare("cpu")
        assert teacher.module is net
        teacher.prepare("cpu", torch.float64)
        assert flags(net) == modes
        running = teacher.module
        teacher.prepare("cpu", torch.float64)
        assert teacher.module is running is not net
        assert teacher(torch.randn(5, 4)).dtype == torch.float64
        teacher.prepare("cpu")
        assert teacher.module is net
        teacher.release()
        assert (digest(net), flags(net)) == (before, modes)

    def test_its_own_goes_first(self, net: Net) -> None:
        teacher = Teacher(net, dtype="bfloat16")
        teacher.prepare("cpu", torch.float64)
        assert teacher(torch.randn(5, 4)).dtype == torch.bfloat16


class Movable(nn.Linear):
    """Stands for a device that this machine may lack; its values do not survive."""

    def to(self, device: Any) -> Movable:  # type: ignore[override]
        self.moves.append(str(device))
        return self.to_empty(device=device)


class TestDevice:
    def test_moves_once_and_back(self) -> None:
        net = Movable(4, 2)
        net.moves = []
        teacher = Teacher(net)
        teacher.prepare("cpu")
        assert net.moves == []
        teacher.prepare("meta")
        teacher.prepare(torch.device("meta"))
        assert net.moves == ["meta"]
        net.to_empty(device="cpu")  # the user moves it in between
        teacher.prepare("meta")
        assert net.moves == ["meta", "meta"]
        teacher.release()
        assert net.moves == ["meta", "meta", "cpu"]
        assert net.weight.device.type == "cpu"
        teacher.release()
        assert len(net.moves) == 3

    def test_an_unmoved_module_is_not_moved_back(self) -> None:
        net = Movable(4, 2)
        net.moves = []
        first, second = Teacher(net), Teacher(net)
        first.prepare("meta")
        second.prepare("meta")
        first.release()
        second.release()
        assert net.moves == ["meta", "cpu"]

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_gpu(self, net: Net) -> None:
        before = digest(net)
        net.head.cuda()
        lit = Lit()
        lit.net = net
        teacher = Teacher(lit)
        teacher.prepare("cuda")
        assert lit.device.type == "cuda"
        assert {tensor.device.type for tensor in (*net.parameters(), *net.buffers())} == {"cuda"}
        torch.cuda.set_sync_debug_mode("error")
        try:
            teacher.prepare("cuda")
            teacher(torch.ones(5, 4, device="cuda"))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        teacher.release()
        assert lit.device.type == "cpu"
        assert {tensor.device.type for tensor in (*net.body.parameters(), *net.body.buffers())} == {"cpu"}
        assert net.head.weight.device.type == "cuda"
        assert digest(net.cpu()) == before


class TestCopies:
    def test_deepcopy_does_not_drag_the_module_along(self, net: Net) -> None:
        teacher = Teacher(net)
        task = nn.Linear(1, 1)
        task.engine = teacher
        assert copy.deepcopy(task).engine is teacher

    @pytest.mark.parametrize("dtype", [None, torch.bfloat16])
    @pytest.mark.parametrize("prepared", [True, False])
    def test_pickle(self, net: Net, dtype: Any, prepared: bool) -> None:
        before, modes = digest(net), flags(net)
        teacher = Teacher(net, inputs=torch.neg, dtype=dtype)
        if prepared:
            teacher.prepare("cpu")
        twin = pickle.loads(pickle.dumps(teacher))
        x = torch.randn(5, 4)
        torch.testing.assert_close(twin(x), teacher(x))
        twin.release()
        own = twin.module if dtype is None else twin._own
        assert own is not net
        assert (digest(own), flags(own)) == (before, modes)


class TestCheckAgainst:
    def test_independent_networks(self, net: Net) -> None:
        Teacher(net).check_against(copy.deepcopy(net))

    def test_same_object(self, net: Net) -> None:
        expected = (
            "The teacher is the student itself: it would change with it, and the term would stay 0. For a student that "
            "starts as its teacher use copy.deepcopy(student) as the teacher."
        )
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
            Teacher(net).check_against(net)

    def test_one_inside_the_other(self, net: Net) -> None:
        task = Lit()
        task.teacher = net
        expected = (
            "The teacher is the submodule 'teacher' of the student, so they share weights and modes. Use "
            "copy.deepcopy(teacher) as the teacher, or keep it outside the student."
        )
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
            Teacher(net).check_against(task)
        with pytest.raises(ValueError, match=r"^The student is the submodule 'net' of the teacher, so they share"):
            Teacher(task).check_against(task.net)
        with pytest.raises(ValueError, match=r"^The teacher is the submodule '_orig_mod' of the student"):
            Teacher(net).check_against(torch.compile(net))

    def test_shared_parameter(self, net: Net) -> None:
        task = Lit()
        task.net.head = net.head
        expected = (
            "The teacher shares 'head.weight' with the student, where it is 'net.head.weight': training would change "
            "both. Use copy.deepcopy(teacher) as the teacher."
        )
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
            Teacher(net).check_against(task)

    def test_shared_memory_and_buffers(self, net: Net) -> None:
        student = Net()
        student.head.bias = nn.Parameter(net.head.bias.detach())
        with pytest.raises(ValueError, match=r"shares 'head\.bias' with the student, where it is 'head\.bias'"):
            Teacher(net).check_against(student)
        student = Net()
        student.body[1].running_mean = net.body[1].running_mean
        with pytest.raises(ValueError, match=r"shares 'body\.1\.running_mean' with the student"):
            Teacher(net).check_against(student)

    def test_no_values(self) -> None:
        with torch.device("meta"):
            empty = Net()
        expected = (
            "'body.0.weight' of the teacher is on the meta device: materialise the teacher first, with its weights."
        )
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
            Teacher(empty).check_against(Net())
        with pytest.raises(
            ValueError, match=r"^'weight' of the teacher is not initialised: materialise the teacher first"
        ):
            Teacher(nn.LazyLinear(2)).check_against(Net())

    def test_students_without_values_and_sparse_buffers(self, net: Net) -> None:
        with torch.device("meta"):
            Teacher(net).check_against(Net())
        net.register_buffer("adjacency", torch.eye(3).to_sparse())
        Teacher(net).check_against(nn.Sequential(nn.LazyLinear(2), nn.Identity()))
