"""`meduet-site`, command by command."""
