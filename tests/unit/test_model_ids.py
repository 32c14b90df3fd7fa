"""Names and ids: what may become a part of a path or of a command line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkypig.errors import InvalidRequest
from forkypig.model import check_name, new_machine_id, new_snapshot_id
from forkypig.model.ids import check_id, is_id


@pytest.mark.parametrize("name", ["a", "web", "web-1", "0", "a" * 63, "m-1"])
def test_good_names(name: str) -> None:
    assert check_name("machine", name) == name


@pytest.mark.parametrize(
    "name", ["", "-a", "a-", "A", "a_b", "a.b", "../a", "a/b", "a\0b", "a b", "a\n", "ä", "a" * 64, "m-0123456789ab"]
)
def test_bad_names_say_what_is_allowed(name: str) -> None:
    with pytest.raises(InvalidRequest, match="use 1 to 63"):
        check_name("machine", name)


@given(st.text(max_size=80))
def test_a_name_that_passes_is_safe_in_a_path(name: str) -> None:
    try:
        check_name("machine", name)
    except InvalidRequest:
        return
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert not name.startswith("-")


def test_new_ids_pass_their_check_and_differ() -> None:
    ids = {new_machine_id() for _ in range(100)} | {new_snapshot_id() for _ in range(100)}
    assert len(ids) == 200
    assert all(check_id(i) == i for i in ids)


def test_ids_with_anything_after_them_are_refused() -> None:
    assert not is_id("m-0123456789ab\n")
    with pytest.raises(InvalidRequest):
        check_id("m-0123456789ab/../x")
