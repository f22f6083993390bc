"""The coordinator process: owns requests and pages, plans every step, runs none."""
