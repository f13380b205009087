"""A run as a folder: its files, its name, where its results come from."""
