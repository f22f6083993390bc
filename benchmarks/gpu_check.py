"""`python -m benchmarks.gpu_check`: acceptance on a machine with an NVIDIA GPU.

There is no part to run yet: the engine has no CUDA storage, no MPS shares and no GPU kernels. This
says so, and ends with status 1, because nothing was shown.
"""

import ctypes
import sys


def main() -> int:
    try:
        ctypes.CDLL("libcuda.so.1")
        found = "an NVIDIA driver is here"
    except OSError:
        found = "no NVIDIA driver is here"
    print(f"gpu_check: {found}; the engine has no CUDA part yet, so nothing was checked")
    return 1


if __name__ == "__main__":
    sys.exit(main())
