from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from peft_mlm import machine
from peft_mlm.machine import can_write, free_disk, memory, nearest, size_of, usable_cores


def test_cores_and_memory_are_those_of_the_machine_or_less() -> None:
    total, free = memory()
    assert 0 < free <= total <= psutil.virtual_memory().total
    assert 0 < usable_cores() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("files", "cores", "limit"),
    [
        ({"cpu.max": "50000 100000", "memory.max": "1000000", "memory.current": "400000"}, 0.5, (1_000_000, 600_000)),
        ({"cpu.max": "max 100000", "memory.max": "max", "memory.current": "5"}, None, None),
        ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, None, None),
        ({"cpu.cfs_quota_us": "25000\n", "cpu.cfs_period_us": "100000\n"}, 0.25, None),
        (
            {
                "memory.limit_in_bytes": "2000",
                "memory.usage_in_bytes": "1500",
                "memory.stat": "cache 900\ntotal_inactive_file 700\n",
            },
            None,
            (2000, 1200),
        ),
        ({"memory.limit_in_bytes": "9223372036854771712", "memory.usage_in_bytes": "5"}, None, None),
    ],
)
def test_a_containers_share_is_what_counts(
    files: dict[str, str],
    cores: float | None,
    limit: tuple[int, int] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "_groups", lambda controller: iter([]))
    whole, (total, _) = usable_cores(), memory()
    monkeypatch.setattr(machine, "_groups", lambda controller: iter([tmp_path]))
    assert usable_cores() == (cores if cores is not None else whole)
    assert memory()[0] == (limit[0] if limit else total)
    if limit:
        assert memory() == limit


def test_a_folder_is_weighed_without_its_links_and_tried_without_a_trace(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "one").write_bytes(b"x" * 1000)
    (tmp_path / "two").write_bytes(b"x" * 10)
    (tmp_path / "link").symlink_to(tmp_path / "blobs" / "one")
    assert size_of(tmp_path)[0] == 1010 + os.lstat(tmp_path / "link").st_size
    assert size_of(tmp_path)[1]
    assert size_of(tmp_path / "none") == (0, True)
    before = sorted(tmp_path.rglob("*"))
    assert can_write(tmp_path / "a" / "b")
    assert nearest(tmp_path / "a" / "b") == tmp_path
    assert free_disk(tmp_path / "a" / "b") > 0
    assert sorted(tmp_path.rglob("*")) == before
    assert not can_write(Path("/proc"))
