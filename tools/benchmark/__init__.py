"""How fast it is; see ``python -m tools.benchmark --help``."""
