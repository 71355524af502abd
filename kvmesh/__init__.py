"""kvmesh: LLM serving whose coordination is programmed."""

__version__ = "0.1.0"
