"""The host's end of the agent's channel: sessions that survive a fork, and the calls that go over them."""
