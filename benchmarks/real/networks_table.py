"""The table that a reader wants first: parameters, multiply-adds and latency of teachers and students."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.real.classes import EMOJI_CLASSES, SECTIONS
from benchmarks.real.data import SIZE, Batch
from benchmarks.real.networks import LENGTH
from benchmarks.real.training import STUDENTS, TEACHERS
from benchmarks.timing import Quartiles, rounds

NETWORKS = "networks.json"
#: Samples of a batch that is timed, beside a single one.
BATCH = 32


def inputs_of(name: str, count: int) -> Batch:
    """Inputs of ``count`` samples, of the size that all runs use."""
    if "BERT" in name or "LM" in name:
        tokens = torch.ones(count, LENGTH, dtype=torch.long)
        return Batch({"input_ids": 1000 * tokens, "attention_mask": tokens})
    images = torch.zeros(count, 3, SIZE, SIZE)
    return Batch({"images": images.contiguous(memory_format=torch.channels_last)})


def networks() -> dict[str, nn.Module]:
    """All teachers and students by name; students have as many classes as emoji, or sections."""
    students = {name: make for name, make in STUDENTS.items() if name != "itself"}
    classes = {name: len(SECTIONS if "BERT" in name else EMOJI_CLASSES) for name in students}
    made = {name: make() for name, make in TEACHERS.items()}
    return made | {name: make(classes[name]) for name, make in students.items()}


def multiply_adds(net: nn.Module, inputs: Batch) -> int:
    """Multiply-adds of a forward, of matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        inputs(net.eval())
    return counter.get_total_flops() // 2


def _embeddings(net: nn.Module) -> int:
    return sum(module.weight.numel() for module in net.modules() if isinstance(module, nn.Embedding))


def measure(path: Path, seconds: float = 20.0) -> None:
    """Measure on one thread and write to ``path``; latencies are medians of processor time in interleaved rounds."""
    torch.set_num_threads(1)
    nets = {name: net.eval().to(memory_format=torch.channels_last) for name, net in networks().items()}

    def forward(name: str, count: int) -> Callable[[], object]:
        inputs = inputs_of(name, count)
        return torch.no_grad()(lambda: inputs(nets[name]))

    timed = rounds({f"{name}/{count}": forward(name, count) for name in nets for count in (1, BATCH)}, seconds=seconds)
    rows: dict[str, Any] = {}
    for name, net in nets.items():
        rows[name] = {
            "parameters": sum(parameter.numel() for parameter in net.parameters()),
            "embeddings": _embeddings(net),
            "multiply_adds": multiply_adds(net, inputs_of(name, 1)),
            "latency_ms": round(1000 * Quartiles.of(timed[f"{name}/1"]).median, 2),
            "batch_ms": round(1000 * Quartiles.of(timed[f"{name}/{BATCH}"]).median, 1),
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def table(path: Path) -> list[str]:
    """The table in Markdown, nothing where it was not measured."""
    if not path.exists():
        return []
    lines = [
        "| network | parameters, M (of these embeddings) | multiply-adds, M | one sample, ms | batch of 32, ms |",
        "|---|---|---|---|---|",
    ]
    for name, row in json.loads(path.read_text()).items():
        own = f" ({row['embeddings'] / 1e6:.2f})" if row["embeddings"] else ""
        role = "teacher" if name in TEACHERS else "student"
        lines.append(
            f"| {name}, {role} | {row['parameters'] / 1e6:.2f}{own} | {row['multiply_adds'] / 1e6:.1f} | "
            f"{row['latency_ms']:.1f} | {row['batch_ms']:.0f} |"
        )
    return [*lines, ""]
