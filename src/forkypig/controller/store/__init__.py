"""What the controller remembers, in SQL: one module per table, on connections that engine.py hands out."""

from forkypig.controller.store.engine import Store

__all__ = ["Store"]
