"""The REST API: HTTP with JSON in front, the controller's gRPC behind, by the SDK. It keeps and decides nothing: who
calls, what they may do, quotas and idempotency are the controller's, which gets the caller's headers with each call.
"""

CAN_NOT = 78  # a worker's exit code for what another start does not change: EX_CONFIG of sysexits.h
