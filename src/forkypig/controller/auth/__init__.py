"""Who may call: tokens, certificates, users of this computer, roles."""
