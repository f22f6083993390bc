"""Compiles one program in a process of its own: a compile that fails may take its process along.

    python -m benchmarks.aot.child h100 FOLDER benchmarks.aot.programs:kernel '["kv_write", …]'

`compile_in_child` is the other end of it.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from benchmarks.aot import report
from benchmarks.aot.report import Report

_STATS: Final = "stats.json"
_TIMEOUT_S: Final = 900.0
_ROOT: Final = Path(__file__).parent.parent.parent


class CompileError(Exception):
    """A program did not compile. The message ends with what the compilers said last."""


def compile_in_child(gpu: str, builder: str, args: Sequence[Any] = ()) -> Report:
    """Compiles what `builder(*args)` describes and reports on it.

    Args:
      gpu: a name in `described_gpu.GPU_NAMES`.
      builder: "module:function" of a function that returns a `programs.Program`.
      args: its arguments, as JSON can carry them.

    Raises:
      CompileError: it does not compile.
    """
    with tempfile.TemporaryDirectory(prefix="aot-") as name:
        folder = Path(name)
        with open(folder / report.LOG, "w") as log:
            command = [sys.executable, "-m", __spec__.name, gpu, name, builder, json.dumps(args)]
            done = subprocess.run(
                command, env=_environment(folder), stderr=log, timeout=_TIMEOUT_S, check=False
            )
        if done.returncode != 0:
            text = (folder / report.LOG).read_text().strip()
            raise CompileError(f"exit status {done.returncode}: {text[-2000:]}")
        return report.read(folder, json.loads((folder / _STATS).read_text()))


def _environment(folder: Path) -> dict[str, str]:
    """That makes the compilers write down what they do."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "PYTHONPATH": os.pathsep.join([str(_ROOT), *filter(None, sys.path)]),
        "XLA_FLAGS": f"--xla_dump_to={folder} --xla_gpu_ptx_compiler_extra_flags=-v",
        "MOSAIC_GPU_DUMP_TO": str(folder),
        "TF_CPP_MIN_LOG_LEVEL": "0",
        "TF_CPP_VMODULE": "subprocess_compilation=2",
    }


def main(gpu: Any, folder: str, builder: str, args: str) -> None:
    from semipd_jax.runtime.described_gpu import DescribedGpu

    module, function = builder.split(":")
    program = getattr(import_module(module), function)(*json.loads(args))
    start_s = time.monotonic()
    compiled = program.compile(DescribedGpu(gpu))
    compile_s = time.monotonic() - start_s
    memory = compiled.memory_analysis()
    stats = {
        "argument_bytes": memory.argument_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "compile_s": compile_s,
    }
    (Path(folder) / _STATS).write_text(json.dumps(stats))


if __name__ == "__main__":
    main(*sys.argv[1:])
