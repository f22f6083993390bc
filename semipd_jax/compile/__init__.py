"""Compiling ahead of the first start: on the machine that will serve, or for a GPU elsewhere."""
