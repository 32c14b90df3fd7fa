# `make demo` and `make test` are the two commands; everything they need is set up by scripts that skip what is there.
SHELL := /bin/bash
BIN := .venv/bin
GENERATED := src/forkypig/v1

.PHONY: stubs
stubs:
	find $(GENERATED) -name '*_pb2*' -delete
	$(BIN)/python -m grpc_tools.protoc -Iproto --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
	  --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --python_out=src --grpc_python_out=src --mypy_out=src --mypy_grpc_out=src proto/forkypig/v1/*.proto
