"""Correctness and cost on a GPU, in one command: ``python -m benchmarks.gpu``; ``--cpu`` rehearses it without one.

Checks values, gradients and plans on CUDA against float64 on the CPU, counts waits and kernel launches, captures the
plan solve in a CUDA graph, and times the solve, GeomLoss' loss beside it, and a ResNet-50 step (bfloat16, batch 64,
224 × 224, five pairs) with CUDA events; times fits with the callback, without and with the teacher cache; and, where
there are two devices, steps of the global batch through NCCL. Writes ``results/gpu.json`` and ``results/gpu.md``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_page import write
from benchmarks.gpu_runs import against_samples_loss, callback_epochs, global_steps
from benchmarks.pages import RESULTS, here
from benchmarks.problems import CLOUDS, COSTS, SHAPES, neurons
from benchmarks.steps import STAGES, Steps, TermAlone, engine_step
from benchmarks.timing import Quartiles, wall_clock
from lightning_otrt.steps.engine import TransportEngine
from lightning_otrt.steps.settings import TermSettings
from lightning_otrt.transport.named_costs import get_cost
from lightning_otrt.transport.sinkhorn import sinkhorn_plan

#: Largest relative error of a value, 1 - cosine of a gradient, and error of a plan relative to its largest entry.
LIMITS = {"value": 1e-3, "gradient": 1e-4, "plan": 2e-2}


def check(device: str, shapes: tuple[tuple[int, int, int], ...]) -> list[dict[str, Any]]:
    """Two calls of the engine (cold, then warm) in float32 on the device and in float64 on the CPU."""
    found = []
    for shape in shapes:
        for cloud in CLOUDS:
            for cost in COSTS:
                for memory in (0.0, 0.98):
                    results = [_calls(shape, cloud, cost, memory, *where) for where in _places(device)]
                    (value, gradient, plan), (expected, direction, target) = results
                    errors = {
                        "value": float((value - expected).abs() / expected.abs()),
                        "gradient": float(1 - torch.cosine_similarity(gradient.flatten(), direction.flatten(), 0)),
                        "plan": float((plan - target).abs().max() / target.max()),
                    }
                    passed = all(errors[name] <= limit for name, limit in LIMITS.items())
                    where = {"shape": shape, "cloud": cloud, "cost": cost, "memory": memory}
                    found.append({**where, "errors": errors, "passed": passed})
    return found


def _places(device: str) -> tuple[tuple[str, torch.dtype], tuple[str, torch.dtype]]:
    return (device, torch.float32), ("cpu", torch.float64)


def _calls(
    shape: tuple[int, int, int], cloud: str, cost: str, memory: float, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    engine = _engine(cost, memory)
    y, x = (side.to(device, dtype) for side in neurons(shape, cloud))
    y.requires_grad_()
    for _ in range(2):
        y.grad = None
        value = engine.term([[(y, x)]], shape[2])[0]
        value.backward()
    plan = engine.states[0].plan
    assert plan is not None
    assert y.grad is not None
    return value.detach().cpu().double(), y.grad.cpu().double(), plan.matrix.cpu().double()


def _engine(cost: str, memory: float = 0.0, solve_every: int = 1) -> TransportEngine:
    settings = TermSettings(get_cost(cost), memory=memory, solve_every=solve_every)
    return TransportEngine([("s", "t")], [1.0], settings)


def count(device: str, shape: tuple[int, int, int]) -> list[dict[str, Any]]:
    """Kernel launches of a call (operations on a CPU), and whether one waits for the device."""
    found = []
    for cost in COSTS:
        for memory in (0.0, 0.98):
            for solve, graphs in itertools.product((False, True), (False, True)):
                step = engine_step(shape, cost, memory, solve, device, graphs=graphs)
                for _ in range(4):
                    step()  # the calls before a capture, and the capture
                waits = _waits(step, device)
                kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
                with profile(activities=kinds) as record:
                    step()
                names = [event.name for event in record.events() or []]
                launches = sum("LaunchKernel" in name or "GraphLaunch" in name for name in names)
                if device != "cuda":
                    launches = sum(name.startswith("aten::") for name in names)
                what = {"cost": cost, "memory": memory, "solve": solve, "graphs": graphs}
                found.append({**what, "launches": launches, "waits": waits})
    return found


def _waits(step: Callable[[], object], device: str) -> int | None:
    """Calls that wait for the device; None where there is none to wait for."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def capture(shape: tuple[int, int, int]) -> dict[str, Any]:
    """The warm plan solve as a CUDA graph: the same plan, and the time of both."""
    cost = torch.rand(2, *shape[:2], device="cuda")
    start = torch.zeros(2, shape[1], device="cuda")
    solve = partial(sinkhorn_plan, cost, 0.01, potential=start, iterations=8)
    solve()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = solve()
    cost.copy_(torch.rand_like(cost))
    graph.replay()
    expected = solve().matrix
    error = float((result.matrix - expected).abs().max() / expected.max())
    return {"error": error, "milliseconds": time_of(solve, "cuda"), "graph": time_of(graph.replay, "cuda")}


def time_of(function: Callable[[], object], device: str, repeats: int = 30) -> Quartiles:
    """Milliseconds of a call, by CUDA events."""
    function()
    if device != "cuda":
        return Quartiles.of([1e3 * wall_clock(function) for _ in range(3)])
    events = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        events.append((start, stop))
    torch.cuda.synchronize()
    return Quartiles.of([start.elapsed_time(stop) for start, stop in events])


def solve_times(device: str, shapes: tuple[tuple[int, int, int], ...]) -> list[dict[str, Any]]:
    """Forward and backward of the term of one pair, over one bare matrix product."""
    found = []
    for shape in shapes:
        plan, x = torch.rand(shape[:2], device=device), torch.randn(shape[1:], device=device)
        row: dict[str, Any] = {"shape": shape, "product": time_of(lambda plan=plan, x=x: plan @ x, device)}
        for cost in COSTS:
            for solve, graphs in itertools.product((False, True), (False, True)):
                name = f"{cost}, {'solving' if solve else 'between'}, {'graphs' if graphs else 'no graphs'}"
                row[name] = time_of(engine_step(shape, cost, 0.0, solve, device, graphs=graphs), device)
        found.append(row)
    return found


def network_step(device: str, *, graphs: bool = True) -> dict[str, Any]:
    """ResNet-50, bfloat16 autocast, five pairs: steps with and without the term, in turn; and the term alone.

    A call is timed over ten steps, one of which solves.
    """
    cuda = device == "cuda"
    images = torch.randn(64 if cuda else 4, 3, 224 if cuda else 32, 224 if cuda else 32, device=device)
    steps = Steps(resnet50 if cuda else tiny, images, partial(_autocast, device), graphs=graphs)
    task, whole = [], []
    # Attached once: the first call after it traces the layers, which is another forward of both networks.
    with steps.transfer.attached(steps.student):
        for _ in range(40):  # early solves, and the captures of both kinds of call
            steps.whole()
        for _ in range(8 if cuda else 1):
            task.append(time_of(lambda: [steps.task() for _ in range(10)], device, repeats=1).median / 10)
            whole.append(time_of(lambda: [steps.whole() for _ in range(10)], device, repeats=1).median / 10)
    alone = TermAlone(steps)
    with alone.transfer.attached(alone.student):
        for _ in range(40):
            alone()
        term = time_of(lambda: [alone() for _ in range(10)], device, repeats=5).median / 10
    base = Quartiles.of(task).median
    return {
        "milliseconds": base,
        "overhead, %": Quartiles.of([100 * (b - a) / a for a, b in zip(task, whole, strict=True)]),
        "term alone, %": 100 * term / base,
        "goal, %": 3.0,
    }


def resnet50() -> nn.Module:
    """ResNet-50 with random weights."""
    from torchvision import models

    return models.resnet50()


def tiny() -> nn.Module:
    """Five small layers that stand for a ResNet where there is no GPU."""
    model = nn.Sequential()
    for index, stage in enumerate(STAGES[:-1]):
        convolution = nn.Conv2d(4 * index or 3, 4 * index + 4, 3, stride=2, padding=1)
        model.add_module(stage, nn.Sequential(convolution, nn.ReLU()))
    model.add_module(STAGES[-1], nn.AdaptiveAvgPool2d(1))
    model.append(nn.Flatten()).append(nn.Linear(16, 10))
    return model


def _autocast(device: str) -> AbstractContextManager[object]:
    return torch.autocast(device, torch.bfloat16)


def measure(device: str) -> dict[str, Any]:
    """All parts; on ``"cpu"`` with tiny networks."""
    rehearsal = device == "cpu"
    shapes = ((24, 24, 64), (32, 16, 48)) if rehearsal else SHAPES
    size, batch = (32, 4) if rehearsal else (224, 64)
    results: dict[str, Any] = {
        "device": "cpu" if rehearsal else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        # The package leaves these as the user set them.
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "checks": check(device, shapes),
        "counts": count(device, shapes[0]),
        "solve, ms": solve_times(device, shapes),
        "SamplesLoss, ms": against_samples_loss(device, shapes[:3], lambda function: time_of(function, device)),
        "step": network_step(device),
        "step, no graphs": network_step(device, graphs=False),
        "fit, ms a step": callback_epochs(
            device, tiny if rehearsal else resnet50, torch.randn(4 * batch if rehearsal else 2048, 3, size, size), batch
        ),
    }
    if not rehearsal:
        results["graph"] = capture(shapes[1])
    if rehearsal or torch.cuda.device_count() > 1:
        results["two processes, ms a step"] = global_steps(device, calls=2 if rehearsal else 50)
    return results


def main() -> int:
    """Run all parts and write the results; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="rehearse on the CPU with tiny networks; writes nothing")
    parser.add_argument("--report", action="store_true", help="write the page from results/gpu.json, and run nothing")
    options = parser.parse_args()
    rehearsal, path = options.cpu, RESULTS / "gpu.json"
    if options.report:
        write(json.loads(path.read_text()))
        return 0
    if not rehearsal and not torch.cuda.is_available():
        print("benchmarks.gpu: there is no CUDA device here, so there is nothing to measure. `--cpu` rehearses it.")
        return 0
    start = time.perf_counter()
    results = {
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "where": here(),
        **measure("cpu" if rehearsal else "cuda"),
    }
    results["seconds"] = time.perf_counter() - start
    failed = [row for row in results["checks"] if not row["passed"]]
    waiting = [row for row in results["counts"] if row["waits"]]
    for row in (*failed, *waiting):
        print("failed:", row)
    waits = "waits were not counted" if rehearsal else f"{len(waiting)} of {len(results['counts'])} kinds of call wait"
    print(f"{len(results['checks']) - len(failed)} of {len(results['checks'])} checks pass; {waits}.")
    print(json.dumps({key: results[key] for key in results if key not in ("checks", "counts")}, indent=1))
    if not rehearsal:
        path.write_text(json.dumps(results, indent=1) + "\n")
        write(json.loads(path.read_text()))
    return 1 if failed or waiting else 0


if __name__ == "__main__":
    sys.exit(main())
