"""One file an experiment: what varies, and the rows that it adds to its CSV."""
