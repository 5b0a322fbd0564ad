"""Everything that is done to a network, one step a file."""
