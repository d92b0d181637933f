"""The main loops and everything that decides: the only part of the package that knows Ray."""
