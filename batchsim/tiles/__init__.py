"""Tile-synchronised kernels: grids, dependences, policies and their compiler, the model of the multiprocessors."""
