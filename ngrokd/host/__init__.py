"""What we change on this machine, as plans, and the only code that needs its rights."""
