"""The worker process: maps the memory, compiles its phase's steps, runs what it is told."""
