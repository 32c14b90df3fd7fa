"""The REST API: HTTP with JSON in front, the controller's gRPC behind, by the SDK. It keeps and decides nothing: who
calls, what they may do, quotas and idempotency are the controller's, which gets the caller's headers with each call.
"""
