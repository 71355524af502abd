"""The built-in strategies, one a file; found through the entry point group kvmesh.strategies."""
