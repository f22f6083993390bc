"""`python -m fake_talker`: reports a lot, and then repeats every command; is never ready."""

from semipd_jax.child import Child, run_child

NUM_REPORTS = 2000


def main(child: Child) -> None:
    for i in range(NUM_REPORTS):
        child.progress("load weights", i + 1, NUM_REPORTS)
    while not child.stopping.is_set():
        child.wait(60.0)
        repeat(child)
    repeat(child)  # what came together with the end


def repeat(child: Child) -> None:
    for command in child.receive():
        child.progress(str(command), 0, 0)


if __name__ == "__main__":
    run_child(main)
