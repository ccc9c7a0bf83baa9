"""Speeds, as ratios of two things measured in one run; tests measure none."""
