"""Runs in the demo's machine: holds state in memory and in files, and tells what it holds.

`demo_program.py serve` keeps a token and a table that are nowhere but in its memory, counts, and writes a journal.
`demo_program.py ask JSON` asks the one that serves, and prints its answer.
"""

import hashlib
import json
import os
import pathlib
import socket
import sys

ADDRESS = "/run/demo.sock"
JOURNAL = pathlib.Path("/root/journal")
TABLE_BYTES = 20 << 20
TICK_S = 0.02


class Program:
    """All of the state."""

    def __init__(self) -> None:
        self.token = os.urandom(16).hex()
        self.table = bytearray(os.urandom(TABLE_BYTES))
        self.count = 0
        self.word = ""
        self.journal = JOURNAL.open("ab", buffering=0)

    def tick(self) -> None:
        """Time goes on, in memory and in the file."""
        self.count += 1
        self.journal.write(f"{self.count} {self.token}\n".encode())

    def tell(self, word: str) -> None:
        """Takes a word to heart: in memory, in the table, in the journal."""
        self.word = word
        self.table[: len(word)] = word.encode()
        self.journal.write(f"told {word}\n".encode())

    def state(self, journal_bytes: int) -> dict[str, object]:
        """What is held now; of the journal the first `journal_bytes` (0: all) go into its checksum."""
        written = JOURNAL.read_bytes()
        journal_bytes = journal_bytes or len(written)
        return {
            "pid": os.getpid(),
            "token": self.token,
            "table": hashlib.sha256(self.table).hexdigest(),
            "count": self.count,
            "word": self.word,
            "journal_bytes": journal_bytes,
            "journal": hashlib.sha256(written[:journal_bytes]).hexdigest(),
            "told_in_journal": [line[5:] for line in written.decode().splitlines() if line.startswith("told ")],
            "hostname": socket.gethostname(),
            "random": pathlib.Path("/dev/urandom").open("rb").read(8).hex(),
        }

    def answer(self, request: dict[str, object]) -> dict[str, object]:
        """Does what is asked, and says how things are then."""
        if request.get("word"):
            self.tell(str(request["word"]))
        return self.state(int(str(request.get("journal_bytes", 0))))


def serve() -> None:
    """Counts, and answers in between."""
    program = Program()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(ADDRESS)
    listener.listen(8)
    listener.settimeout(TICK_S)
    while True:
        program.tick()
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        connection.settimeout(10)
        with connection, connection.makefile("rwb") as stream:
            stream.write(json.dumps(program.answer(json.loads(stream.readline()))).encode())


def ask(request: str) -> None:
    """Prints the answer of the program that serves."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(ADDRESS)
        connection.sendall(request.encode() + b"\n")
        print(connection.makefile("rb").read().decode())


if __name__ == "__main__":
    serve() if sys.argv[1] == "serve" else ask(sys.argv[2])
