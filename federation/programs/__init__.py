"""Programs beside ours: Flower's, their sockets and health, what keeps them up."""
