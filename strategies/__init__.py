"""How many sites become one model (server side only)."""
