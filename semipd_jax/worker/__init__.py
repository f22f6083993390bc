"""The worker process: maps the memory, compiles its lane's steps, runs what it is told."""
