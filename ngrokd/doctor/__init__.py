"""What is the matter with this machine: who is in the way of a start, what a dead daemon left, and what does not work.

It may know all rooms, as the daemon may, and changes nothing but what `residue` removes when it is told to.
"""
