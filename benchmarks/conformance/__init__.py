"""`python -m benchmarks.conformance`: clients that others wrote, against this server."""
