"""The MCP server: the tools that an agent needs to work in machines, fork them, and go back. It uses the SDK alone."""
