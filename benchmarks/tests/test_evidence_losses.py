"""The rivals' losses against hand-computed cases, other implementations and the invariances that their papers claim."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.evidence import losses
from benchmarks.evidence.networks import Features, positions


def features(samples: int = 6, neurons: tuple[int, ...] = (3, 4), classes: int = 5, side: int = 8) -> Features:
    blocks = [torch.randn(samples, side * side, width, dtype=torch.float64) for width in neurons]
    penultimate = torch.randn(samples, neurons[-1], dtype=torch.float64)
    head = torch.randn(neurons[-1], classes, dtype=torch.float64)
    return Features(blocks, penultimate, penultimate @ head)


@pytest.fixture
def pair() -> tuple[Features, Features]:
    return features(), features(neurons=(6, 8))


LOSSES = [
    losses.SoftTargets,
    losses.LearningWithoutForgetting,
    losses.HintPenultimate,
    losses.HintBlocks,
    lambda y, x: losses.HintBlocks(y, x, grid=4),
    lambda y, x: losses.WithHints(losses.SoftTargets(y, x), losses.HintBlocks(y, x), 3.0),
    losses.AttentionTransfer,
    losses.SimilarityPreserving,
    losses.RelationalDistillation,
    losses.CenteredKernelAlignment,
    losses.ContrastiveDistillation,
]


@pytest.mark.parametrize("make", LOSSES)
def test_gradients_are_those_of_finite_differences(make, pair: tuple[Features, Features]) -> None:
    student, teacher = features(4, (2, 3), side=2), features(4, (3, 4), side=2)
    loss = make(student, teacher).double()
    inputs = [*student.blocks, student.penultimate, student.logits]
    for tensor in inputs:
        tensor.requires_grad_()

    def value(*tensors: Tensor) -> Tensor:
        *blocks, penultimate, logits = tensors
        return loss(Features(blocks, penultimate, logits), teacher)

    assert torch.autograd.gradcheck(value, inputs)


@pytest.mark.parametrize("make", LOSSES)
def test_the_teacher_itself_is_at_least_as_good_as_noise(make) -> None:
    """Losses with a projection: after fitting it to the teacher itself."""
    teacher, noise = features(16, (3, 4)), features(16, (3, 4))
    values = []
    for student in (teacher, noise):
        torch.manual_seed(0)
        loss = make(student, teacher).double()
        if parameters := list(loss.parameters()):
            optimizer = torch.optim.Adam(parameters, lr=0.1)
            for _ in range(60):
                optimizer.zero_grad()
                loss(student, teacher).backward()
                optimizer.step()
        values.append(loss(student, teacher).item())
    assert values[0] < values[1]


def test_soft_targets_by_hand() -> None:
    student = Features([], torch.zeros(1, 1), torch.tensor([[0.0, 0.0]]))
    teacher = Features([], torch.zeros(1, 1), torch.tensor([[4 * math.log(3.0), 0.0]]))
    # Softened by 4, the teacher says (3/4, 1/4), the student (1/2, 1/2).
    expected = 16 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert losses.SoftTargets(student, teacher)(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_second_head_has_the_classes_of_the_teacher(pair: tuple[Features, Features]) -> None:
    student, teacher = features(classes=7), pair[1]
    loss = losses.LearningWithoutForgetting(student, teacher).double()
    logits = loss.head(student.penultimate)
    expected = losses.SoftTargets(student, teacher)(Features([], student.penultimate, logits), teacher)
    torch.testing.assert_close(loss(student, teacher), expected)


def test_relative_error_is_one_for_the_mean_and_zero_for_the_target() -> None:
    target = 5 + 3 * torch.randn(200, 4)
    assert losses.relative_error(target.mean(0).expand_as(target), target).item() == pytest.approx(1, abs=1e-5)
    assert losses.relative_error(target, target) == 0


def test_hints_are_one_by_one_convolutions(pair: tuple[Features, Features]) -> None:
    student, teacher = pair
    loss = losses.HintBlocks(student, teacher).double()
    found = []
    for project, y, x in zip(loss.project, student.blocks, teacher.blocks, strict=True):
        convolution = nn.Conv2d(y.shape[2], x.shape[2], 1).double()
        convolution.weight.data = project.weight.data[:, :, None, None]
        convolution.bias.data = project.bias.data
        prediction = convolution(y.movedim(-1, 1).unflatten(2, (8, 8))).flatten(2).movedim(1, -1)
        found.append(losses.relative_error(prediction, x))
    torch.testing.assert_close(loss(student, teacher), sum(found) / 2)


def test_attention_by_hand() -> None:
    # Mean squares (9, 16) over neurons, of norm sqrt(337).
    block = torch.tensor([[[3.0, 3.0], [4.0, 4.0]]])
    expected = torch.tensor([[9.0, 16.0]]) / math.sqrt(337)
    torch.testing.assert_close(losses.AttentionTransfer.attention(block), expected)


def test_attention_ignores_order_and_number_of_neurons(pair: tuple[Features, Features]) -> None:
    student, teacher = pair
    loss = losses.AttentionTransfer(student, teacher)
    doubled = Features([torch.cat([y, y], -1).flip(-1) for y in student.blocks], student.penultimate, student.logits)
    torch.testing.assert_close(loss(doubled, teacher), loss(student, teacher))


def test_similarity_by_hand() -> None:
    # Gram matrix ((1, 1), (1, 2)): rows of norm sqrt(2) and sqrt(5).
    block = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]])
    expected = torch.tensor([[1.0, 1.0], [1.0, 2.0]]) / torch.tensor([[math.sqrt(2)], [math.sqrt(5)]])
    torch.testing.assert_close(losses.SimilarityPreserving.similarity(block), expected)


def test_similarity_ignores_rotations(pair: tuple[Features, Features]) -> None:
    student, teacher = pair
    loss = losses.SimilarityPreserving(student, teacher)
    rotations = [torch.linalg.qr(torch.randn(w, w, dtype=torch.float64))[0] for w in (3, 4)]
    turned = [y @ rotation for y, rotation in zip(student.blocks, rotations, strict=True)]
    torch.testing.assert_close(loss(Features(turned, student.penultimate, student.logits), teacher), loss(*pair))


def test_distances_are_those_of_cdist_over_their_mean() -> None:
    x = torch.randn(7, 3, dtype=torch.float64)
    found = torch.cdist(x, x)
    torch.testing.assert_close(losses.distances(x), found / (found.sum() / 42), rtol=1e-6, atol=1e-6)


def test_angles_by_hand() -> None:
    # A right angle at the origin, 45 degrees at the two others.
    cosines = losses.angles(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    assert cosines[0, 1, 2].item() == pytest.approx(0, abs=1e-6)
    assert cosines[1, 0, 2].item() == pytest.approx(math.sqrt(0.5))
    assert cosines[2, 0, 1].item() == pytest.approx(math.sqrt(0.5))


def test_relations_ignore_motion_and_scale(pair: tuple[Features, Features]) -> None:
    student, teacher = pair
    loss = losses.RelationalDistillation(student, teacher)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    moved = Features(student.blocks, 3 * student.penultimate @ rotation + 2, student.logits)
    torch.testing.assert_close(loss(moved, teacher), loss(*pair), rtol=1e-6, atol=1e-8)


def test_cka_of_one_neuron_each_is_their_squared_correlation() -> None:
    y, x = torch.randn(2, 50, 1, dtype=torch.float64)
    correlation = torch.corrcoef(torch.stack([y[:, 0], x[:, 0]]))[0, 1]
    torch.testing.assert_close(losses.cka(y, x), correlation**2)


def test_cka_is_that_of_centred_gram_matrices() -> None:
    y, x = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 5, dtype=torch.float64)
    centre = torch.eye(20, dtype=torch.float64) - 1 / 20
    k, g = centre @ y @ y.T @ centre, centre @ x @ x.T @ centre
    torch.testing.assert_close(losses.cka(y, x), (k * g).sum() / (k.norm() * g.norm()))


def test_contrast_of_perfect_and_of_no_information() -> None:
    size = 8
    same = Features([], torch.eye(size), torch.zeros(size, 2))
    loss = losses.ContrastiveDistillation(same, same)
    loss.teacher.load_state_dict(loss.student.state_dict())
    constant = Features([], torch.ones(size, size), torch.zeros(size, 2))
    assert loss(constant, same).item() > loss(same, same).item()
    # A student that says nothing is right by chance.
    assert loss(constant, constant).item() == pytest.approx(math.log(size), rel=1e-5)


def test_start_penalty_by_hand() -> None:
    parameters = {"a": torch.tensor([1.0, 2.0]), "head": torch.tensor([9.0])}
    assert losses.l2_sp(parameters, {"a": torch.tensor([0.0, 4.0])}).item() == 0.5 * (1 + 4)


def test_pooling_is_that_of_maps() -> None:
    maps = torch.randn(2, 3, 8, 8)
    expected = positions(F.avg_pool2d(maps, 2), 1)
    torch.testing.assert_close(losses.pooled(positions(maps, 1), 4), expected)
    assert losses.pooled(expected, 4) is expected
