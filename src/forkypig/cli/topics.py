"""The commands by topic: how `forky --help` lists them."""

from typing import TYPE_CHECKING

from typer.core import TyperGroup

if TYPE_CHECKING:
    from typer._click import Context, HelpFormatter

TOPICS = {
    "Machines": ("run", "ps", "inspect", "exec", "shell", "cp", "logs", "pause", "resume", "stop", "start", "rm"),
    "Forks and history": (
        *("fork", "snapshot", "snapshots", "tree", "log", "tag", "diff", "restore", "bisect", "hibernate", "wake"),
    ),
    "Pools": ("pool", "acquire", "renew", "release"),
    "Networks and limits": ("update", "port"),
    "Images and snapshots on the move": ("image", "export", "import", "push", "pull", "key", "gc", "fsck"),
    "What goes on": ("events", "top", "metrics", "audit", "ksm", "bench"),
    "Tenants and access": ("tenant", "quota", "share", "unshare", "auth"),
    "The installation": ("up", "down", "status", "doctor", "config", "completion", "mcp"),
}
_SENTENCE = 200  # characters, more than any: what is longer than a line goes on in the next, and nothing is cut


class ByTopic(TyperGroup):
    """A group whose help lists its commands by topic."""

    def format_commands(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        """A section for each of TOPICS."""
        for topic, names in TOPICS.items():
            commands = [(name, command) for name in names if (command := self.get_command(ctx, name)) is not None]
            with formatter.section(topic):
                formatter.write_dl([(name, command.get_short_help_str(_SENTENCE)) for name, command in commands])
