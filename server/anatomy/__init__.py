"""A start from public anatomy: what a network learns at the centre before it meets a patient."""
