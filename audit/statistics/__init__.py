"""What a count, an area or a guess proves: intervals, lower bounds of epsilon, what a promise allows."""
