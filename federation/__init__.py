"""What both sides must agree on, and nothing else: plan, messages, journal."""
