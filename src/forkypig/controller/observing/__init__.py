"""What is seen of the machines from outside: events, usage, metrics."""
