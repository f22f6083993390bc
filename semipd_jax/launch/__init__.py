"""Starts, watches and replaces the processes of an engine."""
