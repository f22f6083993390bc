"""semi-PD in JAX: prefill and decode in separate processes over one copy of weights and KV."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from semipd_jax.engine import AsyncEngine, Engine

__all__ = ["AsyncEngine", "Engine"]


def __getattr__(name: str) -> Any:
    """The engine is imported on first use: child processes import this package, not the engine."""
    if name in __all__:
        from semipd_jax import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
