"""What hostd answers: its gRPC services, protobuf in and out."""
