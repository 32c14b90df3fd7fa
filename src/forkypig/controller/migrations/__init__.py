"""The schema's history. Applied by Store.open; a new revision is a file in versions/."""
