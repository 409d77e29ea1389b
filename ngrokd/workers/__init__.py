"""The data plane as several processes without rights: one queue of the device, one stack, one pool for each.

supervisor   the daemon's side: starts workers, tells them, asks them, replaces those that end
worker       the other side: `ngrokd.dataplane.DataPlane`, told and asked over a socket
messages     what both say, as bytes; pure
merge        limits divided, numbers added; pure
channel      frames and descriptors over a socket
process      a process of its own, and its end
rights       how a worker gives up what it could do to this machine
"""
