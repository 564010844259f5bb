"""A folder of kept samples: shared, killed at any moment, damaged, full, not to be written."""

from __future__ import annotations

import errno
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import CONTEXT, run_processes, start_server
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from stored import FINGERPRINT, check, keys_of, tensors_of

from lightning_otrt.teacher.cache import folder_store, store
from lightning_otrt.teacher.cache.folder_store import FolderStore

SAMPLES = torch.arange(30)


def filled(folder: Path, samples: torch.Tensor = SAMPLES, **options: Any) -> FolderStore:
    made = FolderStore(folder, FINGERPRINT, **options)
    made.add(keys_of(samples), tensors_of(samples))
    made.flush()
    return made


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_another_run_reads_it(tmp_path: Path) -> None:
    filled(tmp_path / "made" / "on the way")
    later = FolderStore(tmp_path / "made" / "on the way", FINGERPRINT)
    assert later.samples == 30
    assert later.bytes == 30 * (24 + 4 * 64)
    assert check(later, SAMPLES).all()


def test_the_files_are_those_of_safetensors(tmp_path: Path) -> None:
    filled(tmp_path, dtype="bfloat16")
    [path] = files(tmp_path)
    with safe_open(path, "pt") as file:
        assert file.metadata()["fingerprint"] == FINGERPRINT
        assert torch.equal(file.get_tensor("keys"), keys_of(SAMPLES))
        assert file.get_tensor("rows").dtype == torch.bfloat16


def test_nothing_is_written_twice(tmp_path: Path) -> None:
    first, second = filled(tmp_path), FolderStore(tmp_path, FINGERPRINT)
    assert second.add(keys_of(SAMPLES), tensors_of(SAMPLES)) == 0
    for each in (first, second):
        each.flush()
        each.flush()
    assert len(files(tmp_path)) == 1


def test_others_are_seen_when_samples_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_store, "SECONDS_BETWEEN_LISTINGS", 0.0)
    first, second = (FolderStore(tmp_path, FINGERPRINT) for _ in range(2))
    assert not check(second, SAMPLES).any()
    first.add(keys_of(SAMPLES), tensors_of(SAMPLES))
    assert not check(second, SAMPLES).any()
    first.flush()
    assert check(second, SAMPLES).all()


def test_a_folder_is_not_listed_all_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (FolderStore(tmp_path, FINGERPRINT) for _ in range(2))
    first.add(keys_of(SAMPLES), tensors_of(SAMPLES))
    first.flush()
    monkeypatch.setattr(folder_store, "SECONDS_BETWEEN_LISTINGS", 3600.0)
    assert not check(second, SAMPLES).any()
    second.refresh()
    assert check(second, SAMPLES).all()


def test_samples_do_not_wait_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_store, "SECONDS_UNTIL_WRITTEN", 0.0)
    first = FolderStore(tmp_path, FINGERPRINT)
    first.add(keys_of(SAMPLES), tensors_of(SAMPLES))
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("change", [{"fingerprint": "another teacher"}, {"dtype": "bfloat16"}])
def test_another_teacher_or_type_is_another_store(tmp_path: Path, change: dict[str, Any]) -> None:
    first = filled(tmp_path)
    other = FolderStore(**{"folder": tmp_path, "fingerprint": FINGERPRINT, **change})
    assert not check(other, SAMPLES).any()
    other.add(keys_of(SAMPLES[:5]), {name: tensor[:5] for name, tensor in tensors_of(SAMPLES).items()})
    other.flush()
    assert first.path != other.path
    assert FolderStore(tmp_path, FINGERPRINT).samples == 30


def test_files_of_another_teacher_are_refused(tmp_path: Path) -> None:
    first = filled(tmp_path)
    other = FolderStore(tmp_path, "another teacher")
    shutil.copy(files(first.path)[0], other.path)
    with pytest.warns(UserWarning, match="belongs to another fingerprint"):
        other.refresh()
    assert not check(other, SAMPLES).any()


@pytest.mark.parametrize("left", [0, 1, 7, 100, 500, 5000, -1])
def test_a_file_that_was_cut_is_left_out(tmp_path: Path, left: int) -> None:
    """No process leaves such a file, but a disk that lost its power may."""
    filled(tmp_path)
    [cut] = files(tmp_path)
    filled(tmp_path, SAMPLES + 100)
    content = cut.read_bytes()
    cut.write_bytes(content[:left])
    with pytest.warns(UserWarning, match=f"{cut.name} is left out .* It can be deleted") as caught:
        later = FolderStore(tmp_path, FINGERPRINT)
    assert len(caught) == 1
    assert not check(later, SAMPLES).any()
    assert check(later, SAMPLES + 100).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        later.refresh()


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, header: tensors.pop("checks"),
        lambda tensors, header: tensors.update(rows=tensors["rows"][:-1].clone()),
        lambda tensors, header: tensors.update(rows=tensors["rows"][:, :-4].clone()),
        lambda tensors, header: tensors.update(rows=tensors["rows"].double()),
        lambda tensors, header: tensors.update(keys=tensors["keys"][:, :1].clone()),
        lambda tensors, header: header.pop("layout"),
        lambda tensors, header: header.update(layout="[["),
        lambda tensors, header: header.update(layout="3"),
        lambda tensors, header: header.clear(),
    ],
)
def test_a_file_with_other_content_is_left_out(tmp_path: Path, change: Any) -> None:
    made = filled(tmp_path)
    [path] = files(tmp_path)
    with safe_open(path, "pt") as file:
        header = dict(file.metadata())
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118, it is no mapping
    change(tensors, header)
    path.unlink()
    save_file(tensors, made.path / "other.safetensors", header)
    with pytest.warns(UserWarning, match="other.safetensors is left out"):
        later = FolderStore(tmp_path, FINGERPRINT)
    assert not check(later, SAMPLES).any()


@pytest.mark.parametrize("part", ["rows", "keys", "checks"])
def test_damage_is_seen(tmp_path: Path, part: str) -> None:
    """A flipped bit of a row costs that sample, which is then made and kept anew."""
    filled(tmp_path)
    [path] = files(tmp_path)
    content = bytearray(path.read_bytes())
    with safe_open(path, "pt") as file:
        wanted = file.get_tensor(part)[4:5].contiguous().view(torch.uint8).numpy().tobytes()
    content[content.index(wanted)] ^= 4
    path.write_bytes(content)
    later = FolderStore(tmp_path, FINGERPRINT)
    others = [sample != 4 for sample in SAMPLES.tolist()]
    if part == "keys":
        # A sample that nobody asks for.
        assert check(later, SAMPLES).tolist() == others
    else:
        with pytest.warns(UserWarning, match="1 samples in the teacher cache in .* are damaged"):
            assert check(later, SAMPLES).tolist() == others
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check(later, SAMPLES).tolist() == others
        assert later.add(keys_of(SAMPLES), tensors_of(SAMPLES)) == 1
        assert check(later, SAMPLES).all()


def damage(path: Path, sample: int) -> None:
    """Flip a bit in the row of a sample."""
    content = bytearray(path.read_bytes())
    with safe_open(path, "pt") as file:
        wanted = file.get_tensor("rows")[sample].numpy().tobytes()
    content[content.index(wanted)] ^= 4
    path.write_bytes(content)


def test_good_copies_are_found_behind_damaged_ones(tmp_path: Path) -> None:
    """Those of two processes, and those of a run after the damage, whichever file is read first."""
    writers = [FolderStore(tmp_path, FINGERPRINT) for _ in range(2)]
    for writer in writers:
        writer.add(keys_of(SAMPLES), tensors_of(SAMPLES))
    for writer in writers:
        writer.flush()
    one, other = files(tmp_path)
    for path, sample in ((one, 4), (other, 5), (one, 6), (other, 6)):
        damage(path, sample)
    for known in (False, True):
        later = FolderStore(tmp_path, FINGERPRINT)
        with pytest.warns(UserWarning, match="samples in the teacher cache in .* are damaged") as caught:
            found = check(later, SAMPLES)
        assert len(caught) == 1
        assert found.tolist() == [known or sample != 6 for sample in SAMPLES.tolist()]
        assert later.add(keys_of(SAMPLES), tensors_of(SAMPLES)) == (not known)
        assert check(later, SAMPLES).all()
        later.flush()
        assert len(files(tmp_path)) == 3, "what was damaged is written once"


def test_damage_is_told_once(tmp_path: Path) -> None:
    filled(tmp_path)
    for sample in (4, 20):
        damage(files(tmp_path)[0], sample)
    later = FolderStore(tmp_path, FINGERPRINT)
    with pytest.warns(UserWarning, match="are damaged: their checksums do not fit") as caught:
        assert [int(check(later, part).sum()) for part in SAMPLES.split(10)] == [9, 10, 9]
    assert len(caught) == 1


def test_rows_are_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path)
    later, checked = FolderStore(tmp_path, FINGERPRINT), []
    original = store.checksums
    monkeypatch.setattr(store, "checksums", lambda keys, words: checked.append(len(keys)) or original(keys, words))
    for _ in range(3):
        assert check(later, SAMPLES[:10]).all()
        assert check(later, SAMPLES[20:]).all()
    assert checked == [10, 10]


def test_leftovers_of_killed_processes_go(tmp_path: Path) -> None:
    made = filled(tmp_path)
    old, new = made.path / ".old.tmp", made.path / ".new.tmp"
    for path in (old, new):
        path.write_bytes(b"half a segm")
    os.utime(old, (time.time() - 7200,) * 2)
    assert check(FolderStore(tmp_path, FINGERPRINT), SAMPLES).all()
    assert not old.exists()
    assert new.exists()


def test_a_cleared_folder(tmp_path: Path) -> None:
    """What a process has opened stays, and it goes on without the folder."""
    made = filled(tmp_path)
    shutil.rmtree(tmp_path)
    assert check(made, SAMPLES).all()
    made.refresh()
    made.add(keys_of(SAMPLES + 100), tensors_of(SAMPLES + 100))
    with pytest.warns(UserWarning, match="a file could not be written"):
        made.flush()
    assert check(made, SAMPLES + 100).all()


def test_a_folder_that_cannot_be_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a folder of somebody else is, which root would write all the same."""
    filled(tmp_path)

    def refuse(path: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.warns(UserWarning, match=r"only read \(.*Permission denied") as caught:
        reading = FolderStore(tmp_path, FINGERPRINT)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = torch.cat([SAMPLES, SAMPLES + 100])
        assert check(reading, both).tolist() == [True] * 30 + [False] * 30
        assert reading.add(keys_of(both), tensors_of(both)) == 0
        reading.flush()
    assert len(files(tmp_path)) == 1


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_with_its_permissions_taken(tmp_path: Path) -> None:
    path = filled(tmp_path).path
    path.chmod(0o500)
    try:
        with pytest.warns(UserWarning, match="only read"):
            assert check(FolderStore(tmp_path, FINGERPRINT), SAMPLES).all()
    finally:
        path.chmod(0o700)


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.warns(UserWarning, match=r"takes no more samples: the folder cannot be made .*Read-only file system"):
        made = FolderStore(tmp_path / "new", FINGERPRINT)
    assert not check(made, SAMPLES).any()
    assert made.add(keys_of(SAMPLES), tensors_of(SAMPLES)) == 0


@pytest.mark.parametrize("below", ["", "further/down"])
def test_a_file_in_place_of_a_folder(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file or lies in one"):
        FolderStore(tmp_path / "file" / below, FINGERPRINT)


def test_a_link_to_nothing_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="or is a link to a folder that does not exist"):
        FolderStore(tmp_path / "link", FINGERPRINT)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error")])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    made = filled(tmp_path)

    def fail(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"as far as it went")
        raise error

    monkeypatch.setattr(folder_store, "save_file", fail)
    made.add(keys_of(SAMPLES + 100), tensors_of(SAMPLES + 100))
    with pytest.warns(UserWarning, match="takes no more samples: a file could not be written") as caught:
        made.flush()
    assert len(caught) == 1
    assert check(made, torch.cat([SAMPLES, SAMPLES + 100])).all()
    assert made.add(keys_of(SAMPLES + 200), tensors_of(SAMPLES + 200)) == 0
    assert len(files(tmp_path)) == 1


def test_a_limit_counts_what_is_there(tmp_path: Path) -> None:
    filled(tmp_path)
    later = FolderStore(tmp_path, FINGERPRINT, limit=35 * (24 + 4 * 64))
    with pytest.warns(UserWarning, match="it holds 35 samples"):
        assert later.add(keys_of(SAMPLES + 100), tensors_of(SAMPLES + 100)) == 5


def test_a_pickle_opens_the_folder_again(tmp_path: Path) -> None:
    other = pickle.loads(pickle.dumps(filled(tmp_path)))
    assert check(other, SAMPLES).all()


def share(folder: str) -> list[int]:
    """Two processes that look up and add the same and other samples, in orders of their own."""
    store.SEGMENT_BYTES, folder_store.SECONDS_BETWEEN_LISTINGS = 4000, 0.0
    rank = int(os.environ["RANK"])
    made = FolderStore(folder, FINGERPRINT)
    generator = torch.Generator().manual_seed(rank)
    counts = []
    for _ in range(2):
        found = 0
        for samples in torch.randperm(400, generator=generator).split(16):
            mask = check(made, samples)
            found += int(mask.sum())
            made.add(keys_of(samples[~mask]), tensors_of(samples[~mask]))
        counts.append(found)
    made.flush()
    return counts


def test_two_processes_at_once(tmp_path: Path) -> None:
    counts = run_processes(2, share, str(tmp_path), init=False)
    # In its second epoch each finds all that it has seen itself.
    assert [count[1] for count in counts] == [400, 400]
    assert check(FolderStore(tmp_path, FINGERPRINT), torch.arange(400)).all()
    # Each made less than everything: the rest was the other's.
    assert sum(count[0] for count in counts) > 0


def write_for_ever(folder: str, start: int) -> None:
    store.SEGMENT_BYTES, folder_store.SECONDS_BETWEEN_LISTINGS = 20_000, 0.01
    made = FolderStore(folder, FINGERPRINT)
    Path(f"{folder}-{os.getpid()}").touch()
    while True:
        samples = torch.arange(start, start + 40)
        mask = check(made, samples)
        made.add(keys_of(samples[~mask]), tensors_of(samples[~mask]))
        start += 20


def kill_and_verify(folder: Path, kills: int) -> int:
    start_server()
    draw = random.Random(0)
    known = torch.zeros(200_000, dtype=torch.bool)
    for kill in range(kills):
        writers = [CONTEXT.Process(target=write_for_ever, args=(str(folder), start)) for start in (0, 100 * kill)]
        for writer in writers:
            writer.start()
        while not all(Path(f"{folder}-{writer.pid}").exists() for writer in writers):
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.5))
        for writer in writers:
            os.kill(writer.pid or 0, signal.SIGKILL)
            writer.join()
            assert writer.exitcode == -signal.SIGKILL
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mask = check(FolderStore(folder, FINGERPRINT), torch.arange(len(known)))
        assert mask[known].all(), "what was found once is found again"
        known |= mask
    return int(known.sum())


def test_killed_at_any_moment(tmp_path: Path) -> None:
    assert kill_and_verify(tmp_path / "shared", kills=4) > 0


@pytest.mark.slow
def test_killed_at_many_moments(tmp_path: Path) -> None:
    assert kill_and_verify(tmp_path / "shared", kills=60) > 1000


def own_memory() -> int:
    """MiB that belong to this process, without pages of mapped files, which the system can take back."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) // 1024
    return 0


def fill_with_many(folder: str) -> tuple[int, int, int]:
    """Memory after the first thousands, after writing all, and after an epoch of reading."""
    made = FolderStore(folder, FINGERPRINT)
    taken = []
    for samples in torch.arange(100_000).split(250):
        made.add(keys_of(samples), tensors_of(samples, 5000))
        if samples[0] in (20_000, 99_750):
            taken.append(own_memory())
    made.flush()
    for samples in torch.randperm(100_000).split(250):
        assert check(made, samples, 5000).all()
    assert made.samples == 100_000
    return taken[0], taken[1], own_memory()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from Linux")
def test_many_samples_in_little_memory(tmp_path: Path) -> None:
    """10⁵ samples of 20 kB, 2 GB: 80 000 of them add less than 48 MiB, of which keys and checksums are the least."""
    here = Path(__file__).parent
    code = (
        f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parents[1])!r}]; import test_folder_store;"
        f"print(*test_folder_store.fill_with_many({str(tmp_path)!r}))"
    )
    # What the allocator keeps of what was freed depends on chance: large blocks go back to the system at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    early, late, after = map(int, run.stdout.split())
    assert late - early < 48
    assert after - early < 48
    shutil.rmtree(tmp_path)


def test_known_samples_do_not_keep_new_ones_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = FolderStore(tmp_path, FINGERPRINT)
    monkeypatch.setattr(folder_store, "SECONDS_UNTIL_WRITTEN", 1e6)
    waiting.add(keys_of(SAMPLES), tensors_of(SAMPLES))
    assert not files(tmp_path)
    monkeypatch.setattr(folder_store, "SECONDS_UNTIL_WRITTEN", 0.0)
    assert check(waiting, SAMPLES).all()
    assert len(files(tmp_path)) == 1
