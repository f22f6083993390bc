"""`python -m benchmarks.fuzz`: inputs of every kind against every public surface."""
