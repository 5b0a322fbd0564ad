"""Tools around the experiments; what has a command line is run as ``python -m tools.<name>``."""
