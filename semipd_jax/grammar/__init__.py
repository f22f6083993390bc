"""The form of an output: which tokens may come next. Host only."""
