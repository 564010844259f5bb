"""What every test runs under: warnings are errors, fixed seeds, autograd and default type as the test found them."""

from __future__ import annotations

import gc
import os
import random
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from expected_warnings import EXPECTED_WARNINGS
from old_versions import skip_newer_models
from processes import set_threads

# Before a file of it is collected for its examples, which would make a second module of that file otherwise.
import lightning_otrt  # noqa: F401

#: Modules that hold assertions of several tests; pytest then shows the values in them, too.
pytest.register_assert_rewrite("helpers", "bad_inputs.fits", "bad_inputs.messages", "bad_inputs.outcomes")


def pytest_configure(config: pytest.Config) -> None:
    """Make warnings errors, but for those of the inventory, and hide GPUs from all tests but those that need one."""
    if not re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        # Else a Trainer takes the GPU, or warns that it does not. `pytest -m gpu` shows it.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    config.addinivalue_line("filterwarnings", "error")
    for line, _ in EXPECTED_WARNINGS:
        config.addinivalue_line("filterwarnings", line)
    set_threads()
    # Each time, not once in a process: else the order of the tests decides which of them a warning of torch fails.
    torch.set_warn_always(True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what old versions of other packages cannot do."""
    skip_newer_models(items)


@pytest.fixture(scope="module", autouse=True)
def _only_new_objects() -> None:
    """Leave what lives already out of garbage collection: to look at all that was imported takes half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _left_as_found() -> Iterator[None]:
    yield
    enabled, inference, dtype = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
    # Set back first: one culprit must not fail every test after it.
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    assert dtype == torch.float32, f"the default type was left at {dtype}"
    assert enabled, "autograd was left switched off"
    assert not inference, "inference mode was left switched on"
