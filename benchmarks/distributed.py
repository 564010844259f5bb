"""What a global batch costs: bytes moved per step and pair beside gathering all activations, and the time of a step.

Run with ``python -m benchmarks.distributed``; writes ``results/distributed.json`` and ``results/distributed.md``.
Processes talk through gloo on one machine, so that times say what the term costs on few cores, not what a network does.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.pages import write_page
from lightning_otrt import RepresentationTransfer

RESULTS = Path(__file__).parent / "results"
COSTS = ("correlation", "sqeuclidean", "euclidean")
WIDTHS = (64, 256, 1024)
#: Observations of one process for the alternative: 64 samples pooled to one position, to 4 x 4. Buffers know none.
OBSERVATIONS = (64, 1024)
PROCESSES = (1, 2, 4)
WORLDS = (2, 4, 64)
SOLVE_EVERY = 10
BATCH = 64  # samples over all processes in the timed runs
REPEATS = 100


def counted(function: Any, sent: list[int]) -> Any:
    """A collective that notes the bytes of its buffer."""

    def run(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return function(tensor, *args, **kwargs)

    return run


def count_bytes(width: int, observations: int, cost: str) -> dict[str, list[int]]:
    """Buffers of each collective of a call that solves and of one that does not, for one pair of equal widths."""
    sent: list[int] = []
    original, dist.all_reduce = dist.all_reduce, counted(dist.all_reduce, sent)
    torch.manual_seed(dist.get_rank())
    student, teacher = nn.Sequential(nn.Linear(8, width)), nn.Sequential(nn.Linear(8, width))
    transfer = RepresentationTransfer(teacher, {"0": "0"}, cost=cost, memory=0, solve_every=SOLVE_EVERY)
    found = {}
    try:
        with transfer.attached(student):
            for call in range(4):
                sent.clear()
                student(torch.randn(observations, 8))
                transfer.loss().backward()
                found[{2: "solve", 3: "between"}.get(call, "first")] = list(sent)
    finally:
        dist.all_reduce = original
    return found


def time_steps(cost: str, mode: str) -> float:
    """Seconds of a training step, its ten calls with one solve averaged; modes: none, global, local."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU()) for a, b in ((3, 32), (32, 32))]
    student: nn.Module = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    teacher = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1))
    size = dist.get_world_size()
    if size > 1:
        student = nn.parallel.DistributedDataParallel(student)
    transfer = RepresentationTransfer(
        teacher, {"0": "0", "1": "2"}, cost=cost, memory=0, solve_every=SOLVE_EVERY, global_batch=mode == "global"
    )
    x, y = torch.randn(BATCH // size, 3, 8, 8), torch.randint(10, (BATCH // size,))
    seconds = []

    def step() -> None:
        loss = nn.functional.cross_entropy(student(x), y)
        (loss if mode == "none" else loss + transfer.loss()).backward()

    def run() -> None:
        for _ in range(SOLVE_EVERY):  # the solves after 0, 1, 2, 4 and 8 calls are over
            step()
        for _ in range(REPEATS // SOLVE_EVERY):
            for _ in range(SOLVE_EVERY):
                start = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - start)

    with nullcontext() if mode == "none" else transfer.attached(student):
        run()
    # The fastest of each of the ten, since other work on the machine only adds.
    blocks_of_ten = [seconds[start::SOLVE_EVERY] for start in range(SOLVE_EVERY)]
    return statistics.mean(map(min, blocks_of_ten))


def work(rank: int, size: int, store: str, out: str) -> None:
    """Everything that processes of one group measure."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size)
    traffic = []
    if size > 1:
        for width in WIDTHS:
            for cost in COSTS:
                traffic.append({"width": width, "cost": cost, **count_bytes(width, OBSERVATIONS[0], cost)})
        for cost in COSTS:
            assert count_bytes(WIDTHS[0], OBSERVATIONS[1], cost) == count_bytes(WIDTHS[0], OBSERVATIONS[0], cost)
    times = {"none": time_steps(COSTS[0], "none")}
    for cost in COSTS:
        for mode in ("local", "global"):
            times[f"{cost} {mode}"] = time_steps(cost, mode)
    if rank == 0:
        Path(out).write_text(json.dumps({"processes": size, "traffic": traffic, "seconds": times}))
    dist.barrier()
    dist.destroy_process_group()


def measure(size: int) -> dict[str, Any]:
    """Run :func:`work` on ``size`` processes."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out.json"
        workers = [context.Process(target=work, args=(rank, size, f"{folder}/store", out)) for rank in range(size)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        result: dict[str, Any] = json.loads(Path(out).read_text())
        return result


def table(results: list[dict[str, Any]], load: float) -> str:
    """The page of results."""
    lines = [
        "# Distributed",
        "",
        "Bytes of the buffers that one process gives to all-reduce, for one pair of `N` student and `N` teacher",
        "neurons, float32, counted in the run. Between solves a call of the correlation sends two buffers, the others",
        "one; a call that solves sends one for all pairs, and where matrices are large another in float32 beside",
        f"the moments in float64. The step is the mean of {SOLVE_EVERY} calls with one solve.",
        "*Gather* is the alternative: every process receives the activations of all (`2 N` neurons, `n` observations",
        "of a process each); it grows with `n` and the processes `W`, and so does each one's work on the cost matrix.",
        "",
        f"| N | cost | solve | between | step | {' | '.join(_head(n, w) for n in OBSERVATIONS for w in WORLDS)} |",
        f"|---:|---|---:|---:|---:|{'---:|' * len(OBSERVATIONS) * len(WORLDS)}",
    ]
    for row in results[-1]["traffic"]:
        solve, between = sum(row["solve"]), sum(row["between"])
        step = (solve + (SOLVE_EVERY - 1) * between) / SOLVE_EVERY
        gather = [8 * row["width"] * n * size for n in OBSERVATIONS for size in WORLDS]
        lines.append(f"| {row['width']} | {row['cost']} | {' | '.join(map(_size, (solve, between, step, *gather)))} |")
    same = results[-2]["traffic"] == results[-1]["traffic"]
    lines += [
        "",
        f"The buffers of 2 and 4 processes are {'the same' if same else 'NOT the same'}; a ring all-reduce moves",
        "2 (W - 1) / W times the buffer through each process, a gather (W - 1) / W times its total.",
        "",
        f"Milliseconds of a training step (forward, backward, DDP) of {BATCH} samples over all processes, two pairs of",
        f"32 → 64 neurons with 16 positions; {os.cpu_count()} cores, one thread a process, torch {torch.__version__},",
        f"gloo on one machine, shared with other work (load {load:.0f}); the fastest of ten at each of ten calls.",
        "*Local* is `global_batch=False`.",
        "",
        f"| processes | no term | {' | '.join(f'{cost}, local | global' for cost in COSTS)} |",
        f"|---:|---:|{'---:|---:|' * len(COSTS)}",
    ]
    for result in results:
        cells = [f"{1000 * seconds:.1f}" for seconds in result["seconds"].values()]
        lines.append(f"| {result['processes']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _head(observations: int, size: int) -> str:
    return f"gather, n = {observations}, W = {size}"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024 or unit == "MiB":
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"
        count /= 1024
    raise AssertionError


def main() -> None:
    """Measure and write both files."""
    results = []
    for size in PROCESSES:
        results.append(measure(size))
        print(f"{size} processes measured", flush=True)
    RESULTS.mkdir(exist_ok=True)
    about: dict[str, Any] = {
        "torch": torch.__version__,
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "results": results,
    }
    (RESULTS / "distributed.json").write_text(json.dumps(about, indent=1) + "\n")
    print(write_page(table(results, about["load"][0])).read_text())


if __name__ == "__main__":
    main()
