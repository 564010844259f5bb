"""What may be written as ``teacher_cache``."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_otrt import RepresentationTransfer, TeacherCache
from lightning_otrt.teacher.cache.folder_store import FolderStore
from lightning_otrt.teacher.cache.options import parse_cache


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("memory", TeacherCache()),
        (" Memory ", TeacherCache()),
        ("4GB", TeacherCache(limit="4GB")),
        ("1.5 GiB", TeacherCache(limit="1.5 GiB")),
        ("outputs/teacher", TeacherCache(folder="outputs/teacher")),
        ("resnet50", TeacherCache(folder="resnet50")),
        ("./{a}", TeacherCache(folder="./{a}")),
        ("run (1)", TeacherCache(folder="run (1)")),
        ("nonesuch", TeacherCache(folder="nonesuch")),
        ("2024-run", TeacherCache(folder="2024-run")),
        ("2024_sweep_of_megabytes", TeacherCache(folder="2024_sweep_of_megabytes")),
        (".5GB", TeacherCache(limit=".5GB")),
        ("4GBytes", TeacherCache(limit="4GBytes")),
        ("./ram", TeacherCache(folder="./ram")),
        (Path("ram"), TeacherCache(folder="ram")),
        ("./1e9", TeacherCache(folder="./1e9")),
        ("ramp", TeacherCache(folder="ramp")),
        ("memory/teacher", TeacherCache(folder="memory/teacher")),
        ("offline", TeacherCache(folder="offline")),
        (Path("outputs"), TeacherCache(folder="outputs")),
        (TeacherCache(dtype="bfloat16"), TeacherCache(dtype="bfloat16")),
    ],
)
def test_forms(value: Any, expected: TeacherCache | None) -> None:
    assert parse_cache(value) == expected


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (
            True,
            TypeError,
            '"memory", a size such as "4GB", a folder, a TeacherCache or None, but got True of type bool',
        ),
        (4_000_000, TypeError, "of type int"),
        (b"folder", TypeError, "of type bytes"),
        ({"folder": "x"}, TypeError, "of type dict"),
        ("4G", ValueError, "Expected a size such as '4GB'"),
        ("4", ValueError, "Expected a size such as '4GB'"),
        ("4,5GB", ValueError, "Expected a size such as '4GB'"),
        ("0GB", ValueError, "Expected a size such as '4GB'"),
        ("{'limt': '4GB'}", ValueError, "The keys of a TeacherCache are `folder`, `limit`"),
        (Path("{'limit': '4GB'}"), ValueError, "is a value written out and no folder"),
        ("['memory']", ValueError, "is a value written out and no folder"),
        ("Namespace(folder=None, limit='much', dtype='float32')", ValueError, "limit='much'"),
        ("TeacherCache()", ValueError, "is a value written out and no folder"),
        ("<lightning_otrt.TeacherCache object>", ValueError, "is a value written out and no folder"),
        ("None", ValueError, "is a value written out and no folder"),
        ("false", ValueError, "is a value written out and no folder"),
        ("", ValueError, "to be a path, but got ''"),
        (__file__, ValueError, "is a file. Choose another path"),
    ],
)
def test_mistakes(value: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        RepresentationTransfer(torch.nn.Linear(2, 2), teacher_cache=value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "size", ["1e9", "1.5e9B", "4 gigabytes", "100 megabytes", "-4GB", "+4GB", "-.5GB", "50%", "50 %"]
)
def test_what_is_meant_as_a_size_is_no_folder(size: str) -> None:
    with pytest.raises(
        ValueError, match=r"^Expected a size such as '4GB' .*is to have this name, write './' before it"
    ):
        parse_cache(size)


@pytest.mark.parametrize(
    "word", ["memory:4GB", "memory,4GB", "memory 4GB", "ram", "RAM ", "mem", "disk", "no", "Off", "yes", "on"]
)
def test_what_is_meant_as_a_place_is_no_folder(word: str) -> None:
    with pytest.raises(ValueError, match=r"Write 'memory' for half of .* a size such as '4GB'.*write './' before it"):
        parse_cache(word)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"folder": 3}, "to be a path"),
        ({"folder": "{'class_path': 'lightning_otrt.TeacherCache'}"}, "is a value written out and no folder"),
        ({"limit": "much"}, "Expected a size"),
        ({"dtype": "float16"}, "to be one of ['float32', 'bfloat16'], but got 'float16'"),
    ],
)
def test_mistakes_of_the_long_form(options: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        TeacherCache(**options)
    assert words in str(caught.value)


def test_opens_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = TeacherCache(limit="1KB", dtype="bfloat16").open("a teacher")
    assert (memory.limit, memory.dtype) == (1000, torch.bfloat16)
    folder = TeacherCache(folder=str(tmp_path / "kept"), limit="1KB").open("a teacher")
    assert isinstance(folder, FolderStore)
    assert (folder.folder, folder.limit) == (tmp_path / "kept", 1000)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert TeacherCache(folder="~/kept").path == tmp_path / "kept"


@pytest.mark.parametrize("dtype", ["bf16", "bf16-true", "bfloat16", torch.bfloat16])
def test_names_of_types(dtype: Any, tmp_path: Path) -> None:
    """Those of `teacher_dtype`; they mean one sub-folder."""
    opened = TeacherCache(str(tmp_path), dtype=dtype).open("a teacher")
    assert isinstance(opened, FolderStore)
    assert opened.dtype == torch.bfloat16
    assert opened.path == FolderStore(tmp_path, "a teacher", dtype="bfloat16").path
    assert TeacherCache(dtype="fp32").open("a teacher").dtype == torch.float32


def test_a_relative_folder_is_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    options = TeacherCache("kept")
    monkeypatch.chdir("elsewhere")
    for each in (options, pickle.loads(pickle.dumps(options))):
        assert each.path == tmp_path / "kept"
        assert each == TeacherCache("kept"), "as it was written"
    options.open("a teacher")
    assert (tmp_path / "kept").is_dir()
    assert not Path("kept").exists()


def test_pickles() -> None:
    options = TeacherCache("outputs", "4GB", "bfloat16")
    assert pickle.loads(pickle.dumps(options)) == options
    assert eval(repr(options)) == options
