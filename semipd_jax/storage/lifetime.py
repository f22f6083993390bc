"""Memory that native code may touch at any time, even while the interpreter shuts down."""

import ctypes


def keep_until_exit(value: object) -> None:
    """Never frees `value`: the interpreter's shutdown would free what is only referenced."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
