"""What a host is asked for beyond what it has."""

import pytest

from forkypig.errors import ResourceExhausted
from forkypig.hostd.children import check_memory


def test_more_children_than_any_host_has_memory_for() -> None:
    check_memory(1)
    with pytest.raises(ResourceExhausted, match="fork fewer"):
        check_memory(10_000_000)
