"""A plug-in of cear-bench: a defense, an attack, and a suite that uses it."""
