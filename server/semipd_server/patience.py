"""How long a client is waited for, whatever it speaks."""

from typing import Final

FIRST_WORD_S: Final = 30.0
"""From a connection's beginning to its first request; from a request's first byte to the end of its
headers."""
BODY_S: Final = 60.0
"""For the rest of a request."""
NEXT_S: Final = 30.0
"""For the next request of a stream of them."""
IDLE_S: Final = 120.0
"""For the next call of a gRPC connection."""
READ_S: Final = 60.0
"""For a client to read what it was sent."""
PROBE_AFTER_S: Final = 60
"""Of silence, after which the other host is asked whether it is still there."""
PROBE_ANSWER_S: Final = 20
"""For its answer."""
