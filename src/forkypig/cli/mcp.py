"""forky mcp."""

import typer

app = typer.Typer()


@app.command()
def mcp() -> None:
    """Serve the Model Context Protocol on standard input and output, for agents.

    See docs/mcp.md for how clients are told of it. The daemons are started at the first call."""
    from forkypig.mcp.server import make_server

    make_server().run("stdio")
