"""The certificates of one home: its authority, the controller's own, and those of callers."""
