"""What a compiled GPU program uses, read from what its compilers left in a folder.

`child` fills the folder: XLA's dump (the optimised program, its launches), Mosaic's dump (PTX,
resources) and, in the log, what ptxas said about every kernel.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

LOG: Final = "log.txt"

_PTXAS: Final = re.compile(
    r"Compiling entry function '(?P<name>\S+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
_LAUNCH: Final = re.compile(
    r"kCustomKernel +\[.*?\] (?P<name>\S+) grid: \[.*?\] threads: \[(?P<threads>[\d, ]+)\]"
    r" +shared_memory: (?P<shared>\d+) bytes"
)
_TRITON_NAME: Final = re.compile(r'"__gpu\$xla\.gpu\.triton".*?op_name="[^"]*?([^/"]+)/pallas_call')
_COPY: Final = re.compile(r"= \(?(\w+)\[([\d,]*)\]\S* (?:\S+\) )?copy(?:-start)?\(")
_SORT: Final = re.compile(r"= \(?\w+\[([\d,]+)\][^=]* sort\([^=]*, dimensions=\{(\d+)\}")
_ITEM_BITS: Final = {"pred": 8, "c64": 64, "c128": 128}


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel.

    Attributes:
      backend: who wrote it: "mosaic", "triton" (both Pallas) or "xla".
      registers: of a thread, as launched.
      spill_bytes: stored and loaded again for want of registers, of a thread.
      shared_bytes: of a thread block.
      threads: of a thread block.
    """

    name: str
    backend: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    threads: int


@dataclass(frozen=True, slots=True)
class Report:
    """A compiled program.

    Attributes:
      alias_bytes: of results that live where a donated argument lived.
      temp_bytes: of temporaries, all at once.
      copies: size in bytes of what each `copy` of the program copies, largest first.
      num_sliced: kernels that read a slice of another array where it lies.
      longest_sort: items of the longest rows that are sorted.
      launches: what the host starts, in order: "kCommandBuffer" is one CUDA graph.
      compile_s: time of tracing, lowering and compiling.
    """

    kernels: tuple[Kernel, ...]
    argument_bytes: int
    alias_bytes: int
    temp_bytes: int
    copies: tuple[int, ...]
    num_sliced: int
    longest_sort: int
    launches: tuple[str, ...]
    compile_s: float

    @property
    def pallas_kernels(self) -> tuple[Kernel, ...]:
        return tuple(k for k in self.kernels if k.backend != "xla")

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"kernels": [asdict(k) for k in self.pallas_kernels]}


def read(folder: Path, stats: dict[str, Any]) -> Report:
    """The report of the one GPU program whose compilation filled the folder.

    Args:
      stats: the fields of Report that the compiled object tells.
    """
    (program,) = folder.glob("*gpu_after_optimizations.txt")
    text = program.read_text()
    thunks = _thunks(program)
    return Report(
        kernels=tuple(_kernels(folder, text, thunks)),
        copies=tuple(sorted(copied_bytes(text), reverse=True)),
        num_sliced=text.count("calls=%dynamic-slice-fusion"),
        longest_sort=max(sorted_items(text), default=0),
        launches=tuple(re.findall(r"^\d+: (k\w+)", thunks, re.MULTILINE)),
        **stats,
    )


def copied_bytes(program: str) -> Iterator[int]:
    """Of every copy instruction of an optimised HLO module."""
    for dtype, dims in _COPY.findall(program):
        bits = re.search(r"\d+", dtype)
        item_bits = _ITEM_BITS.get(dtype) or (int(bits[0]) if bits else 8)
        yield math.prod(int(n) for n in dims.split(",") if n) * item_bits // 8


def sorted_items(program: str) -> Iterator[int]:
    """Length of the rows that each sort instruction of an optimised HLO module sorts."""
    for dims, dimension in _SORT.findall(program):
        yield int(dims.split(",")[int(dimension)])


def _thunks(program: Path) -> str:
    module, _, _ = program.name.partition(".sm_")
    before, after = (
        program.with_name(f"{module}.thunk_sequence{rest}.txt")
        for rest in ("", "_after_thunk_passes")
    )
    return (after if after.exists() else before).read_text()


def _kernels(folder: Path, program: str, thunks: str) -> Iterator[Kernel]:
    launched = {match["name"]: match for match in _LAUNCH.finditer(thunks)}
    triton = set(_TRITON_NAME.findall(program))
    mosaic = {}
    for ptx in folder.glob("*.ptx"):
        name = re.findall(r"\.entry (\w+)", text := ptx.read_text())[0]
        mosaic[name] = _mosaic_shared_bytes(ptx), _mosaic_threads(text)
    for match in _PTXAS.finditer((folder / LOG).read_text()):
        name = match["name"]
        if name in mosaic:
            backend, (shared, threads) = "mosaic", mosaic[name]
        elif name in launched:
            # The second kernel of a name is called name__1.
            backend = "triton" if re.sub(r"__\d+$", "", name) in triton else "xla"
            shared, threads = int(launched[name]["shared"]), _product(launched[name]["threads"])
        else:
            continue  # of a program that XLA compiled on the way
        static = re.search(r"(\d+) bytes smem", match["rest"])
        yield Kernel(
            name=name,
            backend=backend,
            registers=int(match["registers"]),
            spill_bytes=int(match["stores"]) + int(match["loads"]),
            shared_bytes=shared + (int(static[1]) if static else 0),
            threads=threads,
        )


def _mosaic_shared_bytes(ptx: Path) -> int:
    """Scratch, and 8 bytes of each barrier. Since jax 0.12 the number in the name of what was
    lowered need not be that of the machine code: then the most of any kernel of the name counts."""
    lowered = ptx.with_suffix(".resources.txt")
    alike = re.sub(r"_\d+$", "_*", ptx.stem) + ".resources.txt"
    found = [lowered] if lowered.exists() else list(ptx.parent.glob(alike))
    return max(_shared_bytes(path.read_text()) for path in found)


def _shared_bytes(resources: str) -> int:
    scratch = re.findall(r"smem_scratch_bytes=(\d+)", resources)
    barriers = re.findall(r"num_barriers=(\d+)[^)]*\): (\d+)", resources)
    return int(scratch[0]) + 8 * sum(int(size) * int(count) for size, count in barriers)


def _mosaic_threads(ptx: str) -> int:
    return _product(re.findall(r"\.(?:maxntid|reqntid) ([\d, ]+)", ptx)[0])


def _product(numbers: str) -> int:
    return math.prod(int(n) for n in numbers.split(","))
