"""How what crosses is written down: messages, tensors, the vector of a secure sum, largest values, seals."""
