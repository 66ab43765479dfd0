"""Keys, certificates and start-up kits."""
