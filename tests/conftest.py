import os

import pytest

# gRPC's C core tells on standard error of every connection that ends; failures it reports to the caller anyway.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", default="", help="seeds of the kill campaign on real engines, as N or FIRST:END")
    parser.addoption("--fuzz-seconds", type=float, default=6.0, help="How long each fuzzing test goes on.")
    parser.addoption("--fuzz-seed", type=int, default=20261121, help="Of the fuzzing tests' random numbers.")
