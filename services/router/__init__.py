"""The router: the mesh's public door, and the runtime of strategies."""
