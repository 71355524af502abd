"""A whole mesh in one process on a virtual clock: where the services' parts are put together without a network.

This is no service: it may import from all of them, and nothing imports it.
"""
