"""Programs compiled for a GPU that is not here: what they use, and whether that is acceptable."""
