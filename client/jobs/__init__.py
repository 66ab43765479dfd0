"""An answer whose work is done by a job, elsewhere: on a cluster, without a network."""
