"""What is asked, answered and promised, one file per exchange."""
