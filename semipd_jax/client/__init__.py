"""The engine as its front end and the library use it: prompts in, events out, on one event loop."""

from semipd_jax.client.engine_client import EngineClient, Prompt

__all__ = ["EngineClient", "Prompt"]
