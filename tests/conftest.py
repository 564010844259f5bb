"""What every test runs under: warnings are errors, one thread, fixed seeds, and autograd as the test found it."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

#: Warnings of other packages that no change of ours can avoid: a filter and the reason. Anything else fails its test.
EXPECTED_WARNINGS: list[tuple[str, str]] = [
    ("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated", "lightning 2.6.6 asks so; torch 2.15 renamed it"),
    ("ignore:The '(train|val|test)_dataloader' does not have many workers", "no worker process pays for tiny data"),
    (r"ignore:\s.* was deprecated in v4:DeprecationWarning", "LightningCLI calls what jsonargparse 4.49 deprecated"),
    (r"ignore:\s*By default only one Jsonargparse:DeprecationWarning", "comes along with the one above"),
    ("ignore:.*invalid escape sequence", "in POT 0.9.7, told at the first import where the installer compiled nothing"),
    ("ignore:Guards may run slower on Python 3.13.0", "torch says so of that one release, when it compiles"),
    ("ignore:The .grad attribute of a Tensor that is not a leaf", "Dynamo hides it, unless warnings are errors"),
    ("ignore:`training_step` returned `None`", "Lightning tells users of such steps, which are tested on purpose"),
]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error")
    for line, _ in EXPECTED_WARNINGS:
        config.addinivalue_line("filterwarnings", line)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _autograd_left_on() -> Iterator[None]:
    yield
    enabled, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    # Set back first: one culprit must not fail every test after it.
    torch.set_grad_enabled(True)
    assert enabled, "autograd was left switched off"
    assert not inference, "inference mode was left switched on"
