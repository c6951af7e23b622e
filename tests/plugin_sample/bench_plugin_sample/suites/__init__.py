"""Suites of this plug-in: every .toml file here."""
