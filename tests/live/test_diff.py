"""forky diff: what changed between two snapshots, and nothing else."""

from tests.live.conftest import Instance


def test_files_and_memory_that_changed_are_told(forky: Instance) -> None:
    forky.ok("run", "--name", "web")
    forky.sh(
        "web", "printf 'one\\ntwo\\n' > /root/text; echo gone > /root/gone; echo same > /root/same; ln -s a /root/l"
    )
    forky.ok("snapshot", "web", "--tag", "before")
    # One of the same length and with the old times, and one that is only touched.
    forky.sh(
        "web",
        "touch -r /root/text /tmp/time; printf 'one\\ntwq\\n' > /root/text; touch -r /tmp/time /root/text; "
        "rm /tmp/time /root/gone; touch /root/same; ln -sfn b /root/l; echo new > /root/new; "
        "head -c 4000000 /dev/urandom > /dev/shm/noise",
    )
    forky.ok("snapshot", "web", "--tag", "after")
    machines = len(forky.json("ps"))
    found = forky.json("diff", "before", "after", "--patch")
    changes = {change["path"]: change for change in found["files"] if change["path"].startswith("/root/")}
    assert {path: change["change"] for path, change in changes.items()} == {
        "/root/gone": "D",
        "/root/l": "M",
        "/root/new": "A",
        "/root/text": "M",
    }
    assert "-two\n+twq\n" in changes["/root/text"]["patch"]
    assert (changes["/root/l"]["before"]["target"], changes["/root/l"]["after"]["target"]) == ("a", "b")
    assert 4000000 // 4096 <= found["memory"]["pages"] < found["memory"]["total_pages"] // 4
    assert sum(each["length"] for each in found["memory"]["ranges"]) == found["memory"]["pages"] * 4096
    assert len(forky.json("ps")) == machines  # the children that were looked into are gone
    same = forky.json("diff", "after", "after")
    assert not [change for change in same["files"] if change["path"].startswith("/root/")]
    assert same["memory"]["pages"] == 0
    assert "nope" in forky.fails("diff", "before", "nope")
    assert len(forky.json("ps")) == machines
    forky.ok("rm", "web")
