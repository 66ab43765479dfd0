"""`meduet-server`, command by command."""
