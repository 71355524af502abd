import os

# gRPC's C core tells on standard error of every connection that ends; failures it reports to the caller anyway.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
