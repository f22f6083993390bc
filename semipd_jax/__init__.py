"""semi-PD in JAX: prefill and decode in separate processes over one copy of weights and KV."""
