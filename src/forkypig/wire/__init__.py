"""Between the model and protobuf, and between errors and gRPC status. The generated stubs lie in forkypig.v1."""
