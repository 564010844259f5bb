"""What a solve, a step between solves and a whole training step cost: ``python -m benchmarks.speed [--quick]``.

Ratios are taken within interleaved rounds, of processor time of one thread; every method of a solve is tuned to a
value within 1 % of exact EMD on the same cost. Needs ``pip install -e ".[benchmarks]"``.
Writes ``results/speed.json``, ``results/speed.png`` and the page ``results/speed.md``.
"""

from __future__ import annotations

import argparse
import json
import platform
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.orthogonal import calls
from benchmarks.pages import stamp, write_page
from benchmarks.problems import CLOUDS, COSTS, SHAPES, Problem, make_problem, neurons
from benchmarks.rivals import ACCURACY, COSINE, MARGINAL, OURS, tune_all
from benchmarks.steps import Steps, TermAlone, correlation_by_hand, engine_step, resnet18_cifar
from benchmarks.timing import Quartiles, processor_clock, ratios, rounds
from lightning_otrt.analysis.plot_style import CURVE_COLOURS, plain_axes
from lightning_otrt.transport.geomloss_loop import annealing
from lightning_otrt.transport.named_costs import get_cost
from lightning_otrt.transport.sinkhorn import sinkhorn_plan

HERE = Path(__file__).parent
SOLVE_GATES = {(512, 512, 256): (4.0, 8.0), (512, 512, 1024): (2.8, 4.0), (2048, 2048, 256): (3.8, 5.0)}
#: How many per cent the term may add to a step of ResNet-18, by the size of the batch.
LIMITS = {64: 1.5, 16: 6.0}
#: The two matrix products that a cold solve cannot do without: one for the cost, one for the value.
PRODUCTS = "the bare products"
BY_HAND = "correlation by hand"
#: Shapes at which rotations stand beside Sinkhorn plans, and what the project asks of the ratio.
ROTATIONS = (
    (128, 128, 256),
    (256, 512, 1024),
    (512, 512, 256),
    (512, 512, 1024),
    (1024, 512, 1024),
    (2048, 2048, 1024),
)
ROTATION_GATES = {"cold": ((512, 512), 2.0), "between": (None, 1.1), "running": (None, 1.1)}
LOSS, BATCH = "SamplesLoss(debias=False)", "solve_batch, 20 iterations"


@dataclass(frozen=True)
class Gate:
    """A measured number beside the one it has to reach.

    Attributes:
        what: What was measured.
        value: The number.
        limit: What it has to reach.
        at_least: Whether larger is better.
    """

    what: str
    value: float
    limit: float
    at_least: bool

    @property
    def passed(self) -> bool:
        """Whether it does."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def row(self) -> str:
        """A row of the table."""
        sign = "≥" if self.at_least else "≤"
        return f"| {self.what} | {self.value:.3g} | {sign} {self.limit:g} | {'pass' if self.passed else '**fail**'} |"


def measure_solve(problem: Problem, seconds: float) -> dict[str, Any]:
    """Cold solves, forward and backward, by every method."""
    methods = tune_all(problem)
    plan = torch.rand_like(problem.matrix)
    products = {PRODUCTS: lambda: (problem.y @ problem.x.mT, plan @ problem.x)}
    taken = rounds({method.name: method.solve for method in methods} | products, seconds=seconds, least=3)
    found: dict[str, Any] = {}
    for method in methods:
        found[method.name] = {
            "setting": method.setting,
            "value error": method.error,
            "accurate": method.accurate,
            "gradient cosine at epsilon 0.01": problem.cosine(method.solve()[1]),
            "marginal error": method.marginal,
            "gradient cosine": method.cosine,
            "milliseconds": 1e3 * Quartiles.of(taken[method.name]).median,
            "ratio": ratios(taken, method.name, OURS),
        }
    found[PRODUCTS] = {"accurate": True, "ratio": ratios(taken, PRODUCTS, OURS)}
    what = {"shape": problem.shape, "label": problem.label, "cloud": problem.cloud, "cost": problem.cost}
    return {**what, "methods": found}


def measure_solves(shapes: Sequence[tuple[int, int, int]], seconds: float) -> list[dict[str, Any]]:
    """Cold solves of all clouds and costs."""
    found = []
    for shape in shapes:
        for cloud in CLOUDS:
            for cost in COSTS:
                row = measure_solve(make_problem(shape, cloud, cost), seconds)
                found.append(row)
                loss = Quartiles(*row["methods"][LOSS]["ratio"])
                print(f"{row['label']} {cloud} {cost}: SamplesLoss {loss:.1f} times as long", flush=True)
    return found


def measure_between(shape: tuple[int, int, int], seconds: float) -> list[dict[str, Any]]:
    """A step that solves nothing, over one bare matrix product of the plan with the teacher."""
    rows, columns, observations = shape
    plan, x = torch.rand(rows, columns), torch.randn(columns, observations)
    found = []
    for memory in (0.0, 0.98):
        steps: dict[str, Callable[[], object]] = {cost: engine_step(shape, cost, memory) for cost in COSTS}
        steps[BY_HAND] = correlation_by_hand(shape, memory)
        taken = rounds({"product": lambda: plan @ x, **steps}, seconds=seconds, least=20)
        found += [
            {"shape": shape, "cost": cost, "memory": memory, "ratio": ratios(taken, cost, "product")} for cost in steps
        ]
    return found


def measure_warm_start() -> list[dict[str, Any]]:
    """Iterations at the last ε to a marginal error of 1e-2, cold and from the potential of a student a step before."""
    found = []
    for cloud in CLOUDS:
        for name in COSTS:
            y, x = neurons((256, 256, 512), cloud)
            rule, generator = get_cost(name), torch.Generator().manual_seed(1)
            moved = y + 0.05 * torch.randn(y.shape, generator=generator)
            before, after = (rule.matrix(rule.sums(side, x), rule.energy(x))[None] for side in (y, moved))
            potential = sinkhorn_plan(before, 0.01, iterations=60).potential

            def needed(start: torch.Tensor | None, cost: torch.Tensor = after) -> int:
                errors = (sinkhorn_plan(cost, 0.01, potential=start, iterations=count) for count in range(1, 200))
                return next(count for count, plan in enumerate(errors, 1) if plan.marginal_error.item() <= 1e-2)

            cold = needed(None) + len(annealing(0.01))
            found.append({"cloud": cloud, "cost": name, "cold": cold, "warm": needed(potential)})
    return found


def measure_batching(seconds: float) -> list[dict[str, Any]]:
    """Four plans of one shape, one by one over all at once."""
    found = []
    for size in (32, 64, 128, 256):
        costs = torch.rand(4, size, size)
        taken = rounds(
            {
                "single": lambda costs=costs: [sinkhorn_plan(cost[None], 0.01, iterations=8) for cost in costs],
                "batch": lambda costs=costs: sinkhorn_plan(costs, 0.01, iterations=8),
            },
            seconds=seconds,
        )
        found.append({"size": size, "ratio": ratios(taken, "single", "batch")})
    return found


def measure_rotations(seconds: float) -> list[dict[str, Any]]:
    """Calls with a rotation beside those with a Sinkhorn plan."""
    return [
        {"shape": shape, "call": kind, "milliseconds": [row[plan][0] for plan in row], "ratio": row["orthogonal"][1]}
        for shape in ROTATIONS
        for kind, row in calls(shape, seconds).items()
    ]


def measure_step(batch: int, count: int) -> dict[str, Any]:
    """ResNet-18 on images of 32 × 32, five pairs: the term alone and as a difference, over task and teacher."""
    steps = Steps(resnet18_cifar, torch.randn(batch, 3, 32, 32))
    alone = TermAlone(steps)
    with alone.transfer.attached(alone.student):
        for _ in range(9):  # the early solves
            alone()
        term = [sum(processor_clock(alone) for _ in range(10)) / 10 for _ in range(5)]
    task, whole = [], []
    # Attached once: the first call after it traces the layers, which is another forward of both networks.
    with steps.transfer.attached(steps.student):
        for _ in range(2):
            steps.whole()
            steps.task()
        for number in range(count):
            for step in (steps.task, steps.whole)[:: 1 if number % 2 else -1]:
                (task if step == steps.task else whole).append(processor_clock(step))
    base = Quartiles.of(task).median
    return {
        "batch": batch,
        "seconds": base,
        "term alone": Quartiles.of([100 * part / base for part in term]),
        "difference": Quartiles.of([100 * (b - a) / a for a, b in zip(task, whole, strict=True)]),
    }


def judge(results: dict[str, Any]) -> list[Gate]:
    """Every gate with its number."""
    gates = []
    for row in results["solve"]:
        key, where = tuple(row["shape"]), f"{row['label']}, {row['cloud']}, {row['cost']}"
        methods = row["methods"]
        mine = methods[OURS]
        gates.append(Gate(f"value error, %: {where}", 100 * mine["value error"], 100 * ACCURACY, False))
        gates.append(Gate(f"marginal error: {where}", mine["marginal error"], MARGINAL, False))
        gates.append(Gate(f"gradient cosine: {where}", mine["gradient cosine"], COSINE, True))
        if key in SOLVE_GATES:
            gates.append(Gate(f"SamplesLoss / ours: {where}", methods[LOSS]["ratio"][1], SOLVE_GATES[key][0], True))
            gates.append(Gate(f"solve_batch / ours: {where}", methods[BATCH]["ratio"][1], 2.0, True))
    for shape, (_, goal) in SOLVE_GATES.items():
        rows = [row["methods"] for row in results["solve"] if tuple(row["shape"]) == shape]
        if rows:
            medians = [Quartiles.of([row[name]["ratio"][1] for row in rows]).median for name in (LOSS, BATCH)]
            gates.append(Gate(f"goal, median of {shape}: SamplesLoss / ours", medians[0], goal, True))
            gates.append(Gate(f"goal, median of {shape}: solve_batch / ours", medians[1], 2.5, True))
    for row in results["between"]:
        if row["cost"] == BY_HAND:
            continue
        products = 2 if row["cost"] == "euclidean" else 1
        limit = (2.3 if row["memory"] else 1.3) * products
        what = f"between solves / product: {tuple(row['shape'])}, {row['cost']}, memory {row['memory']:g}"
        gates.append(Gate(what, row["ratio"][1], limit, False))
    for row in results.get("rotations", ()):
        widths, limit = ROTATION_GATES.get(row["call"], ((0, 0), 0.0))
        if widths in (None, tuple(row["shape"][:2])):
            what = f"rotation / Sinkhorn, {row['call']}: {tuple(row['shape'])}"
            gates.append(Gate(what, row["ratio"][1], limit, False))
    for row in results["warm start"]:
        limit = 2 if row["cloud"] == "permuted" else row["cold"] / 2
        gates.append(Gate(f"warm iterations: {row['cloud']}, {row['cost']}", row["warm"], limit, False))
    for step in results.get("step", []):
        for what in ("difference", "term alone"):
            gates.append(
                Gate(f"ResNet-18 step, batch {step['batch']}, {what}, %", step[what][1], LIMITS[step["batch"]], False)
            )
    return gates


def report(results: dict[str, Any], gates: list[Gate]) -> str:
    """The page of results."""
    names = list(dict.fromkeys(name for row in results["solve"] for name in row["methods"] if name != OURS))
    lines = [
        "# Speed",
        "",
        f"`{results['command']}` on {results['machine']}, torch {results['torch']}, one thread. Processor time, ratios "
        "within interleaved rounds, median (quartiles). A star marks a method that no setting tried brought within 1 % "
        "of the exact value. Rivals are tuned on the value alone, ours on marginal error and gradient as well. The C "
        "library was made to keep freed pages, as it does in a training process.",
        "",
        f"{sum(gate.passed for gate in gates)} of {len(gates)} gates and goals pass.",
        "",
        "![Speed](speed.png)",
        "",
        "## Cold solve, forward and backward: time of others over ours",
        "",
        f"| problem | ours, ms | {' | '.join(names)} |",
        f"|---|---|{'---|' * len(names)}",
    ]
    for row in results["solve"]:
        cells = []
        for name in names:
            method = row["methods"].get(name)
            star = "" if method is None or method["accurate"] else " *"
            cells.append("" if method is None else f"{Quartiles(*method['ratio']):.1f}{star}")
        mine = row["methods"][OURS]
        where = f"{row['label']} {row['cloud']} {row['cost']}"
        lines.append(f"| {where} | {mine['milliseconds']:.1f} | {' | '.join(cells)} |")
    if "small stamp" in results:
        lines += ["", f"The rows of {results['solve'][0]['label']}, by `--small`: {results['small stamp']}"]
    lines += [
        "",
        "At 128 neurons the time is that of some 250 small operations more than that of arithmetic: compiled code "
        "(OTT-JAX) and scipy's assignment are ahead there. No exact solver is called inside for small problems. Its "
        "plans are other ones than the entropic plans of a GPU or of the next larger layer, with one partner for each "
        "neuron and another gradient, so that one seed would train differently on two devices. `transport_distance` is "
        'the distance that is trained, so the same holds there; for the exact one there is `plan="exact"`.',
        "",
        "## Between two solves: time of a step over one bare product of the plan with the teacher",
        "",
        f"*{BY_HAND.capitalize()}* is an autograd function of the closed form alone, in as few PyTorch operations "
        "as it takes, without dead neurons, checks or state: what a step cannot go below.",
        "",
        "| shape | cost | memory | ratio |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {tuple(row['shape'])} | {row['cost']} | {row['memory']:g} | {Quartiles(*row['ratio']):.2f} |"
        for row in results["between"]
    ]
    if "rotations" in results:
        lines += [
            "",
            "## Rotations beside Sinkhorn plans",
            "",
            "Calls of one pair from neurons to value and gradient, correlation: those that solve without (cold) and "
            "with (warm) an earlier plan, and those that do not, without memory (between) and with (running). A "
            "rotation has no warm start. On a CPU it comes from a singular value decomposition, whose time grows with "
            "the third power of the width, that of a Sinkhorn plan with the second.",
            "",
            "| shape | call | Sinkhorn, ms | rotation, ms | ratio |",
            "|---|---|---|---|---|",
        ]
        for row in results["rotations"]:
            times = " | ".join(f"{time:.3g}" for time in row["milliseconds"])
            lines.append(f"| {tuple(row['shape'])} | {row['call']} | {times} | {Quartiles(*row['ratio']):.2f} |")
        if "rotations stamp" in results:
            lines += ["", results["rotations stamp"]]
    lines += ["", "## Batching: four plans one by one over all at once", "", "| size | ratio |", "|---|---|"]
    lines += [f"| {row['size']} | {Quartiles(*row['ratio']):.2f} |" for row in results["batching"]]
    for step in results.get("step", []):
        lines += [
            "",
            f"ResNet-18 (32 × 32, batch {step['batch']}, five pairs, a solve every 10 calls): the term alone takes "
            f"{Quartiles(*step['term alone']):.2f} % of task step and teacher forward ({step['seconds']:.2f} s); steps "
            f"with and without it differ by {Quartiles(*step['difference']):.1f} %.",
        ]
    if "step stamp" in results:
        lines += ["", f"Steps by `--steps`: {results['step stamp']}"]
    lines += ["", "## Gates and goals", "", "| what | measured | has to be | |", "|---|---|---|---|"]
    return "\n".join(lines + [gate.row() for gate in gates]) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Ratios of the rivals, problem by problem."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [LOSS, BATCH, "POT ot.batch", "POT emd"]
    figure, axes = pyplot.subplots(figsize=(11, 4.5), layout="constrained")
    labels = [f"{row['label']}\n{row['cloud'][:4]} {row['cost'][:4]}" for row in results["solve"]]
    for offset, (name, colour) in enumerate(zip(names, CURVE_COLOURS, strict=False)):
        heights = [row["methods"][name]["ratio"][1] for row in results["solve"]]
        axes.bar([place + 0.2 * offset for place in range(len(heights))], heights, 0.2, label=name, color=colour)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xticks([place + 0.3 for place in range(len(labels))], labels, rotation=90, fontsize=7)
    axes.set_ylabel("time over that of lightning_otrt")
    axes.legend(ncols=4, fontsize=8)
    axes.set_title("Cold solve, forward and backward")
    plain_axes(axes, "y")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure everything, or with ``--quick`` a part of it, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two shapes and no network; writes nothing")
    parser.add_argument("--rotations", action="store_true", help="measure rotations alone; the other results stay")
    parser.add_argument("--small", action="store_true", help="measure the first shape alone; the other results stay")
    parser.add_argument("--steps", action="store_true", help="measure training steps alone; the other results stay")
    options = parser.parse_args()
    quick = options.quick
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", category=UserWarning, module="ot")
    # As in any training process, large blocks were freed before: the C library then keeps pages instead of unmapping.
    torch.zeros(31 * 2**20, dtype=torch.uint8)
    if options.rotations:
        results = json.loads((HERE / "results" / "speed.json").read_text())
        results["rotations"], results["rotations stamp"] = measure_rotations(seconds=3.0), stamp()
        write(results, measured=False)  # the other results are those of an earlier commit
        return
    if options.small:
        results = json.loads((HERE / "results" / "speed.json").read_text())
        others = [row for row in results["solve"] if tuple(row["shape"]) != SHAPES[0]]
        results["solve"], results["small stamp"] = [*measure_solves(SHAPES[:1], seconds=3.0), *others], stamp()
        write(results, measured=False)
        return
    if options.steps:
        results = json.loads((HERE / "results" / "speed.json").read_text())
        results["step"], results["step stamp"] = [measure_step(batch, count=12) for batch in LIMITS], stamp()
        write(results, measured=False)
        return
    results = {
        "command": f"python -m benchmarks.speed{' --quick' if quick else ''}",
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "between": [],
    }
    results["solve"] = measure_solves(SHAPES[:2] if quick else SHAPES, seconds=0.7)
    for shape in SHAPES[1:2] if quick else SHAPES[1:]:
        results["between"] += measure_between(shape, seconds=4.0)
    results["warm start"] = measure_warm_start()
    results["batching"] = measure_batching(seconds=1.0)
    if not quick:
        results["rotations"] = measure_rotations(seconds=3.0)
        results["step"] = [measure_step(batch, count=12) for batch in LIMITS]
        write(results)
    else:
        print(report(results, judge(results)))


def write(results: dict[str, Any], *, measured: bool = True) -> None:
    """Judge results, print and store them."""
    gates = judge(results)
    text = report(results, gates)
    print(text)
    results["gates"] = [{**asdict(gate), "passed": gate.passed} for gate in gates]
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "speed.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, HERE / "results" / "speed.png")
    write_page(text, measured=measured)


if __name__ == "__main__":
    main()
