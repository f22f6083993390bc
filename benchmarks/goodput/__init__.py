"""The highest rate at which enough requests meet both targets, for each mode and policy."""
