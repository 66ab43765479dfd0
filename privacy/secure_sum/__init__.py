"""Secure sum: masks that cancel, so that whoever adds vectors up reads their sum and none of them."""
