"""Which calls may come again, as the controller and its clients agree on it."""

KEY = "idempotency-key"  # metadata
# Metadata beside a key that was made for this very call: nobody need look for what came of it before. It says the key
# once more: whoever puts another key in its place on the way need not know of it.
NEW = "idempotency-key-is-new"

# The answer holds a secret, which is kept nowhere.
ONCE = frozenset({"/forkypig.v1.Auth/CreateToken"})

# Streams whose last message is what was asked for; those before tell of progress.
RESULT_AT_LAST = frozenset(
    f"/forkypig.v1.{name}"
    for name in ("Controller/RunMachine", "Controller/HibernateMachine", "Controller/BuildImage", "Store/PullSnapshot")
)
