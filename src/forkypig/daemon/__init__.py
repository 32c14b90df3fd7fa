"""What the daemons share: settings, logging, the gRPC server, signals."""
