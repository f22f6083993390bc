"""Everything the engine can refuse or fail to do. Each class is one outcome a client can see.

EngineError
├── InvalidRequestError     the request can never succeed; the client must change it
├── DuplicateRequestError   a running request already has this id
├── RequestNotFoundError    no running request has this id
├── OverloadedError         the waiting queue is full; the client may retry later
├── UnavailableError        the engine is starting, draining or stopped; nothing was generated
├── RequestFailedError      the engine gave up on a request that had started
├── RequestTimeoutError     a request took longer than the server allows; a TimeoutError, too
├── StartupError            the engine cannot start
│   └── CheckpointError     the model directory is unsupported, incomplete or unsafe
└── ConfigError             a flag or config value is wrong; a ValueError, too
"""


class EngineError(Exception):
    """Base class of everything that can go wrong."""


class InvalidRequestError(EngineError):
    """The request can never succeed.

    Attributes:
      field: what to change.
      is_too_long: the prompt exceeds the model's length.
    """

    def __init__(self, message: str, *, field: str = "", is_too_long: bool = False) -> None:
        super().__init__(message)
        self.field = field
        self.is_too_long = is_too_long


class DuplicateRequestError(EngineError):
    """A running request already has this id."""


class RequestNotFoundError(EngineError):
    """No running request has this id."""


class OverloadedError(EngineError):
    """The waiting queue is full; the client may retry later."""


class UnavailableError(EngineError):
    """The engine is starting, draining or stopped; no token was generated."""


class RequestFailedError(EngineError):
    """The engine gave up on a request after it had started."""


class RequestTimeoutError(EngineError, TimeoutError):
    """The request took longer, in the queue or while it ran, than the server allows."""


class StartupError(EngineError):
    """The engine cannot start."""


class CheckpointError(StartupError):
    """The model directory is unsupported, incomplete, damaged or unsafe."""


class ConfigError(EngineError, ValueError):
    """A configuration value is wrong: names the field, the value and what is allowed."""
