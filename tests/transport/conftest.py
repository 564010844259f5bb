"""Fixtures of the transport tests."""

from __future__ import annotations

import pytest

from lightning_otrt.transport import geomloss_loop


@pytest.fixture(params=["loop", "fallback"])
def solver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to anneal: GeomLoss' private loop, and its public solver, which serves where the loop is gone."""
    if request.param == "fallback":
        monkeypatch.setattr(geomloss_loop, "sinkhorn_loop", None)
    return request.param
