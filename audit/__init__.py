"""Attacks on what a run released, and what they show: a table of findings, a page, an exit status.

Does not do: open a run, a site or a centre; whoever has one passes tensors, names and books.
"""
