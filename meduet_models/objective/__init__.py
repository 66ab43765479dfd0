"""The MeDUET loss: its settings, its terms, the teacher, and the whole of it on one page."""
