"""Training runs: paired, repeatable, with a cached teacher that changes nothing; and the whole path, quickly."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks import transfer
from benchmarks.evidence import data, training
from benchmarks.evidence.experiments import EXPERIMENTS, Experiment
from benchmarks.evidence.methods import ALL, DEFAULT, METHODS, methods_of
from benchmarks.evidence.networks import PAIRS, CachedTeacher, tapped
from benchmarks.evidence.runs import Results, Run
from lightning_otrt import RepresentationTransfer

RUN = Run("2", "digits", DEFAULT, 0.03, 1.0, 8.0, seed=0, per_class=2, steps=3, teacher_steps=2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CACHE", tmp_path / "teachers")
    training.teacher_of.cache_clear()


@pytest.mark.parametrize(("setting", "method"), [(s, m) for s in ALL for m in methods_of(s)])
def test_every_method_trains_in_every_setting(setting: str, method: str) -> None:
    run = replace(
        RUN, setting=setting, method=method, weight=METHODS[method].weights[0] if METHODS[method].weights else 0.0
    )
    found = training.execute(replace(run, source="digits"))
    assert 0 <= found["accuracy"] <= 100


@pytest.mark.parametrize("method", ["plain", "fitnets", DEFAULT])
def test_pool_reaches_the_methods_that_use_a_teacher(method: str) -> None:
    weight = 8.0 if method != "plain" else 0.0
    few = data.labelled("digits", 2, 0)
    run = replace(RUN, method=method, weight=weight)
    without, _ = training.train_student(run, few)
    with_pool, _ = training.train_student(replace(run, pool=True), few)
    same = [torch.equal(a, b) for a, b in zip(without.parameters(), with_pool.parameters(), strict=True)]
    assert all(same) == (method == "plain")


@pytest.mark.parametrize("pair", PAIRS)
def test_pairs_of_networks_train(pair: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = data.Images(torch.rand(12, 1, 32, 32), torch.arange(12) % 3)
    monkeypatch.setattr(data, "everything", lambda task: images)
    for method in ("fitnets-blocks", DEFAULT, "random"):
        run = replace(RUN, method=method, weight=1.0, pair=pair, batch_size=8)
        student, _ = training.train_student(run, images)
        assert all(parameter.isfinite().all() for parameter in student.parameters())


def test_equal_runs_give_equal_results() -> None:
    first, second = training.execute(RUN), training.execute(RUN)
    assert first["accuracy"] == second["accuracy"]


def test_all_methods_of_a_seed_start_alike() -> None:
    students = [training.new_student(replace(RUN, method=method), 10) for method in ("plain", DEFAULT)]
    for one, other in zip(*(student.parameters() for student in students), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    batches = [training.Batches(10, 4, seed=3) for _ in range(2)]
    for _ in range(5):
        assert torch.equal(batches[0].next(), batches[1].next())


def test_a_weight_of_zero_is_plain_training() -> None:
    few = data.labelled("digits", 2, 0)
    plain, _ = training.train_student(replace(RUN, method="plain", weight=0.0), few)
    student, _ = training.train_student(replace(RUN, method="fitnets-blocks", weight=0.0), few)
    for one, other in zip(plain.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_copied_student_starts_from_its_teacher_and_another_from_another_network() -> None:
    run = replace(RUN, source="digits")
    teacher = training.teacher_of("digits", "conv", 0, RUN.teacher_steps)
    copied = training.new_student(replace(run, setting="1"), 10)
    other = training.new_student(replace(run, setting="1x"), 10)
    weight = teacher.blocks[0][0].weight
    assert torch.equal(copied.blocks[0][0].weight, weight)
    assert not torch.equal(other.blocks[0][0].weight, weight)
    assert not torch.equal(copied.head.weight, teacher.head.weight)


def test_a_teacher_is_trained_once_and_loaded_after() -> None:
    first = training.teacher_of("digits", "conv", 0, 2)
    training.teacher_of.cache_clear()
    second = training.teacher_of("digits", "conv", 0, 2)
    assert first is not second
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("layers", ["blocks", "penultimate", ("later blocks", "penultimate"), (1,)])
def test_a_cached_teacher_gives_the_loss_of_the_teacher_itself(layers) -> None:
    pair = PAIRS["conv"]
    teacher, student = pair.teacher(10).eval(), pair.student(10)
    images = torch.randn(20, 1, 16, 16)
    cached = CachedTeacher(teacher, pair, images)
    live_layers = [
        (layer.student, "head:input" if layer.teacher == "penultimate" else f"blocks.{layer.teacher[-1]}")
        for layer in training.layers_of(layers, pair)
    ]
    live = RepresentationTransfer(teacher, live_layers)
    transport = training.Transport(cached, pair, {"layers": layers})
    terms = []
    for indices in (torch.arange(10), torch.tensor([3, 19, 7, 11, 2])):
        transport.indices = indices
        for term in (live, transport.transfer):
            with term.attached(student):
                student.train()(images[indices])
                terms.append(term.loss())
    torch.testing.assert_close(terms[0], terms[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms[2], terms[3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pair", ["conv", "residual", "transformer"])
def test_cached_representations_are_those_of_the_network(pair: str) -> None:
    chosen = PAIRS[pair]
    net = chosen.teacher(5).eval()
    images = torch.randn(7, 1, 32, 32)
    indices = torch.tensor([6, 0, 3])
    found = CachedTeacher(net, chosen, images).features(indices)
    with torch.no_grad(), tapped(net, [name for _, name in chosen.layers], chosen.neuron_axis) as taps:
        logits = net(images[indices])
        expected = taps.take()
    torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.penultimate, expected.penultimate, rtol=1e-4, atol=1e-5)
    for one, other in zip(found.blocks, expected.blocks, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_frozen_features_train_the_head_alone() -> None:
    run = replace(RUN, setting="1", method="frozen", source="digits")
    before = {name: value.clone() for name, value in training.new_student(run, 10).state_dict().items()}
    student, _ = training.train_student(run, data.labelled("digits", 2, 0))
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}


def test_digits_that_choose_are_digits_of_nobody() -> None:
    parts = {
        "train": data.everything("digits").images,
        "validation": data.held_out("digits", "validation").images,
        "test": data.held_out("digits", "test").images,
    }
    flat = {name: {tuple(row) for row in images.flatten(1).tolist()} for name, images in parts.items()}
    assert sum(map(len, flat.values())) == len(set().union(*flat.values()))
    few = {tuple(row) for row in data.labelled("digits", 5, 1).images.flatten(1).tolist()}
    assert few < flat["train"]


def test_plans_are_kept_over_training() -> None:
    run = replace(RUN, setting="1", source="digits", keep_plans=True, steps=6)
    found = training.execute(run)["plans"]
    first = next(iter(found.values()))
    assert next(iter(found)) == "1"
    assert list(found)[-1] == "6"
    for layer in first.values():
        assert 0 <= layer["off_identity"] <= 1
    plan = torch.tensor(next(iter(first.values()))["plan"])
    torch.testing.assert_close(plan.sum(), torch.tensor(16.0), rtol=1e-2, atol=0)


def test_accuracy_of_a_network_that_is_always_right() -> None:
    labels = torch.arange(10) % 5
    images = data.Images(F.one_hot(labels, 5).float(), labels)
    assert training.evaluate(torch.nn.Identity(), images) == 100
    assert math.isclose(training.evaluate(torch.nn.Identity(), data.Images(images.images, labels * 0)), 20)


def _tiny(experiment: Experiment) -> Experiment:
    tuning = replace(experiment.tuning, steps=3, teacher_steps=2)
    return replace(experiment, tuning=tuning, methods=("plain", DEFAULT), seeds=1)


@pytest.mark.slow
def test_the_whole_path_of_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "quick", _tiny)
    folder = tmp_path / "results"
    command = ["--quick", "--experiments", "digits", "plans-1", "--folder", f"{folder}", "--processes", "1"]
    transfer.main(command)
    page = (folder / "transfer.md").read_text()
    assert EXPERIMENTS["digits"].title in page
    assert "| **OT, blocks (default)** |" in page
    assert {path.name for path in folder.iterdir()} == {
        "evidence.jsonl",
        "evidence_accuracy.png",
        "evidence_identity.png",
        "evidence_plans.png",
        "sources.json",
        "transfer.md",
    }
    rows = (folder / "evidence.jsonl").read_text()
    assert len(Results(folder / "evidence.jsonl").rows) == len(rows.splitlines())
    transfer.main(command)
    assert (folder / "evidence.jsonl").read_text() == rows
    assert f"{tmp_path}" not in rows + page
