"""What is looked at: progress in the terminal, image grids, plots."""
