"""A hospital's word: to plans, by whom, that patients are told apart, that sums of few may leave."""
