"""A run: its folder, its record, its rounds, and what happens as it goes on."""
