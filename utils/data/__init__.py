"""Data sets: small images in memory, folders of large ones, and made-up images."""
