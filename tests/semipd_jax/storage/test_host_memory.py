import os
from collections.abc import Mapping
from pathlib import Path

from semipd_jax.storage import cpu
from semipd_jax.storage.host_memory import available_bytes, private_bytes
from semipd_jax.storage.manifest import lay_out

MIB = 2**20
MEMINFO = "MemTotal:       8192 kB\nMemFree:        10 kB\nMemAvailable:   4096 kB\n"


def machine(root: Path, cgroup: str, files: Mapping[str, str]) -> int:
    for path, text in {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": cgroup,
        **{f"sys/fs/cgroup/{path}": text for path, text in files.items()},
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return available_bytes(root)


def group(limit: str, usage: int, cache: int) -> Mapping[str, str]:
    return {
        "memory.max": f"{limit}\n",
        "memory.current": f"{usage}\n",
        "memory.stat": f"anon 7\ninactive_file {cache}\nactive_file 9\n",
    }


def at(directory: str, files: Mapping[str, str]) -> dict[str, str]:
    return {f"{directory}/{name}": text for name, text in files.items()}


def test_no_limit(tmp_path: Path) -> None:
    assert machine(tmp_path, "0::/a\n", at("a", group("max", 0, 0))) == 4 * MIB


def test_group_limit_counts_droppable_cache_as_available(tmp_path: Path) -> None:
    files = at("a", group(str(3 * MIB), usage=2 * MIB, cache=MIB // 2))
    assert machine(tmp_path, "0::/a\n", files) == MIB + MIB // 2


def test_tightest_of_nested_groups(tmp_path: Path) -> None:
    files = at("a/b", group(str(3 * MIB), MIB, 0)) | at("a", group(str(5 * MIB), 4 * MIB, 0))
    assert machine(tmp_path, "0::/a/b\n", files) == MIB


def test_container_sees_its_own_group_as_the_top(tmp_path: Path) -> None:
    files = group(str(2 * MIB), usage=MIB, cache=0)
    assert machine(tmp_path, "0::/system.slice/docker-1234.scope\n", files) == MIB


def test_first_version_of_groups(tmp_path: Path) -> None:
    files = at(
        "memory/a",
        {
            "memory.limit_in_bytes": f"{3 * MIB}\n",
            "memory.usage_in_bytes": f"{2 * MIB}\n",
            "memory.stat": "inactive_file 1\ntotal_inactive_file 0\n",
        },
    )
    assert machine(tmp_path, "5:cpu,cpuacct:/a\n4:memory:/a\n0::/\n", files) == MIB


def test_overdrawn_group_leaves_nothing(tmp_path: Path) -> None:
    assert machine(tmp_path, "0::/a\n", at("a", group(str(MIB), 2 * MIB, 0))) == 0


def test_this_machine() -> None:
    assert MIB < available_bytes() < 2**50


def test_what_workers_will_need_is_kept_back(monkeypatch):
    monkeypatch.setattr(cpu.host_memory, "available_bytes", lambda: 4 << 30)
    none = cpu.HostMemories().budget(0.9, 0, 1 << 20)
    some = cpu.HostMemories().budget(0.9, 5, 1 << 20)
    assert none.available_bytes == 4 << 30
    assert none.available_bytes - some.available_bytes == 5 * (cpu.RUNTIME_BYTES + (1 << 20))
    assert "1.96 GiB for 5 workers, each 400 MiB for runtime and programs and 1 MiB" in some.detail
    assert cpu.HostMemories().budget(0.9, 100, 1 << 20).available_bytes == 0


def test_private_memory_is_what_this_process_alone_holds():
    before = private_bytes()
    own = bytearray(os.urandom(1 << 20) * 32)
    assert 30 << 20 < private_bytes() - before < 40 << 20
    shared = cpu.HostMemory(lay_out("r", [("a", (32 << 20,), "int32")]))
    with shared.writing("a") as array:
        array[: 8 << 20] = 1
        assert private_bytes() - before < 40 << 20
    shared.close()
    del own
