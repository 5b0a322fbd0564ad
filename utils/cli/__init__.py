"""Command lines: the parser, the flags, and the settings that follow from them."""
