"""Tools around the experiments; each is run as ``python -m tools.<name>``."""
