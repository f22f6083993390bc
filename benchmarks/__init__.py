"""Programs that measure: `python -m benchmarks.NAME` from the repository root."""
