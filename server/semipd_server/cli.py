"""The command `semipd-jax`."""

import sys
from collections.abc import Sequence
from importlib.metadata import version

_USAGE = """usage: semipd-jax COMMAND [flag ...]

commands:
  serve      serve a model
  top        watch a server in the terminal
  control    show or change a server's shares, policy and promises
  compile    fill the compile cache before the first start
  profile    measure step times on this machine, for the SLO tuner
  simulate   a load under modes and policies, on a virtual clock
  complete   print a completion as it comes

`semipd-jax COMMAND --help` lists the flags of one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; each loads only what it needs. Returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    match name:
        case "serve":
            from semipd_jax import serve

            return serve.main(rest, prog="semipd-jax serve")
        case "top":
            from semipd_server import top

            return top.main(rest)
        case "control":
            from semipd_server import control_client

            return control_client.main(rest, prog="semipd-jax control")
        case "compile":
            from semipd_jax.compile import __main__ as compile_ahead

            return compile_ahead.main(rest, prog="semipd-jax compile")
        case "profile":
            from semipd_jax import profile

            return profile.main(rest, prog="semipd-jax profile")
        case "simulate":
            from semipd_jax import simulate

            return simulate.main(rest, prog="semipd-jax simulate")
        case "complete":
            from semipd_server import client

            client.main(rest, prog="semipd-jax complete")
            return 0
        case "--version":
            print(f"semipd-jax {version('semipd-jax')}")
            return 0
        case "-h" | "--help":
            print(_USAGE)
            return 0
    print(f"semipd-jax: error: command is {name!r}\n{_USAGE}", file=sys.stderr)
    return 2
