"""The path of a training step: what counts as a function, a move and a repeated line, and a real step."""

from __future__ import annotations

from benchmarks.step_path import PACKAGE, STEPS, Call, counts, joined, profiled_steps


def call(module: str, name: str, *calls: Call) -> Call:
    code = compile(f"def {name}(): pass", str(PACKAGE / f"{module.replace('.', '/')}.py"), "exec").co_consts[0]
    return Call(code.replace(co_name=name), list(calls))


def test_counts_and_lines() -> None:
    leaf = call("transport.tensors", "norms")
    inner = call("steps.engine", "solve", Call(leaf.code.replace(co_name="<listcomp>"), [leaf, leaf]))
    step = [call("trainer.callback", "term", inner, call("trainer.training_step", "add"), leaf)]
    # term -> solve, solve -> comprehension in another file, term -> add, term -> norms; all but one between floors.
    assert counts(step) == ["4 (5)", "4", "4", "3"]
    lines = joined([tree.lines() for tree in step])
    assert [line.partition(":")[0] for line in lines] == [
        "trainer.callback",
        "  steps.engine",
        "    transport.tensors",
        "  trainer.training_step",
        "  transport.tensors",
    ]
    assert lines[2].endswith("(2 times)")


def test_a_training_step() -> None:
    steps = profiled_steps()
    assert list(steps) == list(STEPS)
    for calls in steps.values():
        floors = {call.floor for top in calls for call in top.walk()}
        assert {"trainer", "transfer", "reading", "teacher", "steps", "transport"} <= floors
        assert "analysis" not in floors
    between, solving = ([call.title for top in calls for call in top.walk()] for calls in steps.values())
    assert any("sinkhorn" in title for title in solving)
    assert not any("sinkhorn" in title for title in between)
