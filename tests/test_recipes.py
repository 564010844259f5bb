"""Every recipe runs as it stands, in a namespace of its own, and trains on the term."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_otrt import RepresentationTransfer

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
RECIPES = {
    section.splitlines()[0]: re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
}
#: What a recipe needs beyond its imports.
NEEDS = {"Hugging Face Trainer": "accelerate", "LoRA": "peft"}
#: Quick ones that need Lightning and torch alone.
QUICK = {"GANs"}


@pytest.mark.parametrize(
    "title", [pytest.param(title, marks=[] if title in QUICK else [pytest.mark.slow]) for title in RECIPES]
)
@pytest.mark.filterwarnings("ignore")
def test_recipe(title: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if title in NEEDS:
        pytest.importorskip(NEEDS[title])
    trainer, loss = L.Trainer, RepresentationTransfer.loss
    terms: list[float] = []

    def on_the_cpu(**options: Any) -> L.Trainer:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
        return trainer(**{"accelerator": "cpu", **quiet, **options})

    def counted(self: RepresentationTransfer, **options: Any) -> torch.Tensor:
        term = loss(self, **options)
        terms.append(term.item() if term.requires_grad else float("nan"))
        return term

    monkeypatch.setattr(L, "Trainer", on_the_cpu)
    monkeypatch.setattr(RepresentationTransfer, "loss", counted)
    monkeypatch.chdir(tmp_path)
    (code,) = RECIPES[title]
    exec(compile(code, f"{PAGE.name}: {title}", "exec"), {"__name__": "recipe"})
    assert len(terms) >= 2
    assert all(term > 0 for term in terms)


def test_every_recipe_is_listed() -> None:
    listed = re.findall(r"^\| \[(.*?)\]\(#(.*?)\)", PAGE.read_text(), re.MULTILINE)
    assert [title for title, _ in listed] == [title.replace("`", "`") for title in RECIPES]
    assert all(anchor == title.lower().replace(" ", "-").replace("`", "") for title, anchor in listed)
