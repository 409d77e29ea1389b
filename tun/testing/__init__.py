"""The other side for tests: a cable, faults, a client kernel in miniature, and scripts in tcpdump's words."""
