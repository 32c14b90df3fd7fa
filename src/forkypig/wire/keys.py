"""Which calls may come again, as the controller and its clients agree on it."""

KEY = "idempotency-key"  # metadata

# The answer holds a secret, which is kept nowhere.
ONCE = frozenset({"/forkypig.v1.Auth/CreateToken"})

# Streams whose last message is what was asked for; those before tell of progress.
RESULT_AT_LAST = frozenset(
    f"/forkypig.v1.{name}"
    for name in ("Controller/RunMachine", "Controller/HibernateMachine", "Controller/BuildImage", "Store/PullSnapshot")
)
