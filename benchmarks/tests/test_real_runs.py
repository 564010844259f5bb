"""Runs on real checkpoints, with tiny networks and samples in their place: no package is needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.evidence.runs import Results, Run
from benchmarks.real import __main__ as command
from benchmarks.real import data, networks_table, packages, training
from benchmarks.real.cells import CELLS
from benchmarks.real.checkpoints import normalised
from benchmarks.real.classes import EMOJI_CLASSES, OTHER_EMOJI_CLASSES, SECTIONS
from benchmarks.real.methods import METHODS, candidates, methods_of
from benchmarks.real.networks import LENGTH, MeanPooled, ResNet10
from benchmarks.real.recorded import Replay
from lightning_otrt import RepresentationTransfer

IMAGES = Run("scratch", "emoji", "plain", 1e-3, 0.05, 0.0, 0, per_class=3, pair="net -> small", steps=2, batch_size=8)
TEXTS = replace(IMAGES, target="sections", pair="encoder -> small encoder")


class TinyBert(nn.Module):
    """Layers of attention under the names, and with the output, of a model of transformers."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(50, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 8, 0.0, batch_first=True) for _ in range(layers)
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        tokens = self.embeddings(input_ids)
        for layer in self.layers:
            tokens = layer(tokens, src_key_padding_mask=attention_mask == 0)
        return SimpleNamespace(last_hidden_state=tokens)


def tiny_resnet(classes: int) -> nn.Module:
    # Multiples of 8: with oneDNN for AVX2, 1x1 convolutions of other widths, with a stride and the channels last, write
    # beyond their memory in the backward pass (torch 2.14).
    return ResNet10(classes, (8, 8, 8, 16, 16))


class Pooled(nn.Module):
    """A teacher whose pooled features are a layer."""

    def __init__(self, classes: int = 7) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.ReLU()) for i, o in ((3, 8), (8, 12))))
        self.global_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(12, classes)

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.classifier(self.global_pool(self.body(images)))
        return output


def few_emoji() -> packages.Emoji:
    """Ten emoji of each class in two drawings."""
    names = [names[0] for names in EMOJI_CLASSES for _ in range(10)]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2 * len(names), 3, 64, 64), generator=generator, dtype=torch.uint8)
    return packages.Emoji(images, tuple(2 * names), torch.arange(len(names)).repeat(2))


def few_tokens(rows: list[tuple[str, str]], sections: Sequence[str]) -> data.Samples:
    """A text is a number here, which decides its tokens and its length."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(50, (len(rows), LENGTH), generator=generator)
    lengths = torch.tensor([5 + int(text) % 40 for _, text in rows])
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    return data.Samples(
        {"input_ids": ids, "attention_mask": mask}, torch.tensor([sections.index(name) for name, _ in rows])
    )


def clear() -> None:
    for cached in (data._problem, data.texts_of, training.teacher_of, training._recorded, training._frozen_features):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiny networks and data."""

    def encoder() -> nn.Module:
        torch.manual_seed(3)
        return MeanPooled(TinyBert(12, 3)).eval()

    def teacher() -> nn.Module:
        torch.manual_seed(3)
        return Pooled().eval()

    monkeypatch.setattr(training, "TEACHERS", {"net": teacher, "encoder": encoder})
    students = {
        "small": tiny_resnet,
        "small encoder": lambda classes: MeanPooled(TinyBert(8, 2), classes, 8),
        "itself": Pooled,
    }
    monkeypatch.setattr(training, "STUDENTS", students)
    monkeypatch.setattr(training, "FEATURES", {"net": "global_pool", "encoder": "head"})
    pictures = few_emoji()
    monkeypatch.setattr(data, "_emoji_pictures", lambda: pictures)
    texts = [(name, str(number)) for name in SECTIONS for number in range(140)]
    monkeypatch.setattr(data, "_descriptions", lambda: texts)
    monkeypatch.setattr(data, "_tokens", few_tokens)
    clear()
    yield
    clear()


@pytest.mark.parametrize("name", methods_of("scratch"))
@pytest.mark.parametrize("run", [IMAGES, TEXTS], ids=["images", "texts"])
def test_every_method_trains(run: Run, name: str) -> None:
    weights = METHODS[name].weights or (0.0,)
    found = training.execute(replace(run, method=name, weight=weights[0]))
    assert 0 <= found["accuracy"] <= 100
    assert (found.get("step_ms", 0) > 0) != METHODS[name].freeze
    assert ("layers" in found) == (METHODS[name].uses_teacher)


@pytest.mark.parametrize("name", ["l2-sp", "transport", "orthogonal+kd"])
def test_a_copy_trains_against_the_teacher_that_it_comes_from(name: str) -> None:
    run = replace(IMAGES, setting="copied", pair="net -> itself", method=name, weight=METHODS[name].weights[0])
    assert 0 <= training.execute(run)["accuracy"] <= 100


@pytest.mark.parametrize("name", ["transport", "orthogonal+kd", "random-orthogonal"])
@pytest.mark.parametrize("run", [IMAGES, TEXTS], ids=["images", "texts"])
def test_replay_gives_the_term_of_the_teacher_itself(run: Run, name: str) -> None:
    samples = data.problem_of(run).train
    options = {"weight": 8.0, **(METHODS[name].transfer or {})}
    if "kd" in name:
        options["distillation"] = 1.0
    found = []
    for replayed in (False, True):
        student = training.new_student(run, data.problem_of(run).num_classes).train()
        replay = Replay(training.recorded_of(run))
        if replayed:
            transfer = RepresentationTransfer(replay, replay.pairs, teacher_inputs=replay.inputs, **options)
        else:
            transfer = RepresentationTransfer(training.teacher_of(training.names_of(run)[0]), **options)
        with transfer.attached(student):
            for start in (0, 16):
                replay.indices = torch.arange(start, start + 16)
                samples.batch(replay.indices)(student)
                found.append(float(transfer.loss().detach()))
    assert found[:2] == pytest.approx(found[2:], rel=1e-4)


@pytest.mark.parametrize("name", ["orthogonal+kd", "cka"])
def test_a_run_may_name_the_layers_of_the_teacher(name: str) -> None:
    first, last = "bert.layers.0", "bert.layers.2"
    for names, pairs in {(last, first): [("0", last), ("1", first)], ("", last): [("1", last)]}.items():
        run = replace(TEXTS, method=name, weight=8.0, options=((training.TEACHER_LAYERS, names),))
        expected = [f"bert.layers.{student} -> {teacher}" for student, teacher in pairs]
        assert training.execute(run)["layers"] == expected


def test_a_run_may_change_options_of_the_transfer() -> None:
    run = replace(IMAGES, method="orthogonal", weight=8.0)
    accuracy = training.execute(run)["accuracy"]
    assert training.execute(replace(run, options=(("plan", "orthogonal"),)))["accuracy"] == accuracy
    with pytest.raises(ValueError, match="plan"):
        training.execute(replace(run, options=(("plan", "none"),)))


def test_rows_of_other_texts_are_not_continued(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results = Results(tmp_path / "rows.jsonl")
    run = replace(TEXTS, method="frozen", weight=1.0)
    found = training.execute(run)
    assert found["texts"] == data.texts_of("sections")
    assert "texts" not in training.execute(replace(IMAGES, method="frozen", weight=1.0))
    results.add(run, found)
    texts = [(name, f"{number} and more") for name in SECTIONS for number in range(140)]
    monkeypatch.setattr(data, "_descriptions", lambda: texts)
    clear()
    data.check_texts([run], results)  # nothing is missing
    with pytest.raises(ValueError, match=f"of other texts .{found['texts']}"):
        command.run("sections-20-bert2", CELLS["sections-20-bert2"], results, seeds=1)
    old = Results(tmp_path / "old.jsonl")
    old.add(run, {"accuracy": 1.0, "seconds": 1.0})
    with pytest.raises(ValueError, match=r"of other texts \(unknown\)"):
        data.check_texts([replace(run, seed=1)], old)


def test_all_methods_of_a_seed_start_alike() -> None:
    seen: list[tuple[Tensor, ...]] = []
    for weight in (1.0, 4.0):
        student = training.new_student(replace(IMAGES, weight=weight), 5)
        seen.append(tuple(parameter.detach() for parameter in student.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))
    run = replace(IMAGES, method="fitnets", weight=4.0)
    assert training.execute(run)["accuracy"] == training.execute(run)["accuracy"]


def test_no_emoji_that_is_tested_is_seen_before() -> None:
    pictures = few_emoji()
    known = {
        normalised(image.float() / 255).sum().item(): int(who)
        for image, who in zip(pictures.images, pictures.identities, strict=True)
    }

    def identities(samples: data.Samples, count: int) -> set[int]:
        return {known[image.sum().item()] for image in samples.inputs["images"].contiguous()[:count]}

    tests = []
    others: set[int] = set()
    for seed in range(3):
        problem = data.problem_of(replace(IMAGES, seed=seed))
        tests.append(identities(problem.held_out, len(problem.held_out)))
        # The first view is the image itself.
        train = identities(problem.train, len(problem.train) // data.VIEWS)
        chosen = data.problem_of(replace(IMAGES, seed=seed, split="validation"))
        validation = identities(chosen.held_out, len(chosen.held_out))
        assert not train & validation
        assert len(train) == 3 * 22
        others |= train | validation
    assert tests[0] == tests[1] == tests[2]
    assert not tests[0] & others


def test_texts_of_tests_are_in_no_other_part(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [(name, f"{name} {number}") for name in SECTIONS for number in range(140)]
    monkeypatch.setattr(data, "_descriptions", lambda: texts)
    monkeypatch.setattr(data, "_tokens", lambda rows, sections: rows)
    test: Any = data._sections(SECTIONS, 4, 0, "test")
    validation: Any = data._sections(SECTIONS, 4, 0, "validation")
    assert len(test.held_out) == 12 * 80
    assert len(validation.held_out) == 12 * 50
    assert not {*test.held_out} & {*validation.held_out, *validation.train}
    assert not {*validation.train} & {*validation.held_out}
    assert validation.train == test.train
    # More sections leave the parts of the first ones as they are.
    more: Any = data._sections(SECTIONS[:6], 4, 0, "test")
    assert [row for row in test.held_out if row[0] in SECTIONS[:6]] == more.held_out
    assert [row for row in test.train if row[0] in SECTIONS[:6]] == more.train
    many: Any = data._sections(SECTIONS, 1000, 0, "validation")
    assert len(many.train) == 12 * 10


def test_fashion_chooses_on_training_images(monkeypatch: pytest.MonkeyPatch) -> None:
    images = {"train": torch.zeros(60_000, 28, 28, dtype=torch.uint8), "test": torch.full((9, 28, 28), 255)}
    labels = {name: torch.arange(len(value)) % 10 for name, value in images.items()}
    monkeypatch.setattr(packages, "fashion_mnist", lambda split: (images[split], labels[split]))
    run = replace(IMAGES, target="fashion", per_class=2)
    test, validation = (data.problem_of(replace(run, split=split)) for split in ("test", "validation"))
    assert len(test.held_out) == 3
    assert len(validation.held_out) == 1429
    assert test.train.labels.bincount().tolist() == [2 * data.VIEWS] * 10
    assert test.train.inputs["images"].shape[1:] == (3, 64, 64)
    assert float(test.held_out.inputs["images"].min()) > float(validation.held_out.inputs["images"].max())


def test_digits_of_tests_are_in_no_other_part(monkeypatch: pytest.MonkeyPatch) -> None:
    # The pixels of a digit name it.
    values = torch.arange(200)
    images, labels = values[:, None, None].expand(-1, 20, 20).to(torch.uint8), values // 20
    monkeypatch.setattr(packages, "digits", lambda: (images, labels))
    run = replace(IMAGES, target="digits", per_class=4)
    test, validation = (data.problem_of(replace(run, split=split)) for split in ("test", "validation"))
    assert len(test.held_out) == 100
    assert len(validation.held_out) == 60
    assert test.train.labels.bincount().tolist() == [4 * data.VIEWS] * 10

    def seen(samples: data.Samples, count: int) -> set[float]:
        return {round(float(image.mean()), 4) for image in samples.inputs["images"][:count]}

    train, tested, chosen = seen(test.train, 40), seen(test.held_out, 100), seen(validation.held_out, 60)
    assert len(train | tested | chosen) == 200
    assert train == seen(validation.train, 40)


def test_other_classes_of_emoji_are_others() -> None:
    names = [name for names in EMOJI_CLASSES for name in names]
    others = [name for names in OTHER_EMOJI_CLASSES for name in names]
    assert len(OTHER_EMOJI_CLASSES) == len(EMOJI_CLASSES)
    assert len({*names, *others}) == len(names) + len(others)


@pytest.mark.parametrize("kind", ["images", "texts", "fine-tuning"])
def test_every_method_has_the_same_number_of_candidates(kind: str) -> None:
    assert {len(set(candidates(name, kind))) for name, method in METHODS.items() if not method.freeze} == {12}


@pytest.mark.parametrize("name", CELLS)
def test_runs_of_cells_survive_the_disk(name: str) -> None:
    cell = CELLS[name]
    choices = {method: cell.tuning.runs(method, 1000)[0] for method in cell.methods}
    runs = cell.runs(choices)
    assert len(set(runs)) == 5 * len(cell.methods)
    for run in runs:
        assert run.split == "test"
        assert run.batch_size == 32
        assert Run.of({**run.settings}) == run


def test_the_command_writes_a_page_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "emoji-5-resnet10"
    monkeypatch.setattr(training, "TEACHERS", {"EfficientNet-Lite0": training.TEACHERS["net"]})
    monkeypatch.setattr(training, "STUDENTS", {"ResNet-10": tiny_resnet})
    monkeypatch.setattr(networks_table, "TEACHERS", {})
    monkeypatch.setattr(networks_table, "STUDENTS", {"ResNet-10": tiny_resnet})
    monkeypatch.setattr(command, "measure", lambda path: networks_table.measure(path, seconds=0.0))
    folder = tmp_path / "results" / "real"
    options = ["--quick", "--cells", name, "--methods", "plain", "transport", "--folder", str(folder)]
    command.main(options)
    rows = Results(folder / f"{name}.jsonl").rows
    assert len(rows) == 2 * (12 + 2 + 1)
    text = (tmp_path / "results" / "real_checkpoints.md").read_text()
    assert text.startswith("# Real checkpoints\n")
    assert "| **plain** |" in text or "| **transport (default)** |" in text
    assert "| ResNet-10, student |" in text
    assert "missing seeds of distillation of logits alone 1" in text
    monkeypatch.setattr(command, "execute", lambda run, device: pytest.fail("ran again"))
    command.main(options)


def test_multiply_adds_are_counted() -> None:
    net = nn.Sequential(nn.Conv2d(3, 5, 4, stride=4), nn.Flatten(), nn.Linear(5 * 256, 7))
    assert networks_table.multiply_adds(net, networks_table.inputs_of("net", 1)) == 256 * 5 * 3 * 16 + 5 * 256 * 7
