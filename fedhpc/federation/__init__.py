"""Flower on a cluster: the grid, the apps and the rounds."""
