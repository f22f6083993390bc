"""vLLM's gRPC engine contract, as gateways speak it (extra `smg`)."""
