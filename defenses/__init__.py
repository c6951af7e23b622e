"""Defenses: one file a paper, one module-level instance a registered name."""
