"""`python -m fake_deaf`: a process that hangs before it reads what it is told."""

import time

from setproctitle import setproctitle

if __name__ == "__main__":
    setproctitle("semipd: deaf")
    time.sleep(3600)
