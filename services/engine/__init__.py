"""The engine service: sub-request calls over a runtime."""
