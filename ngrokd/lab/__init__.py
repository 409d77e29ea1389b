"""The other side in miniature: a control plane, a binding ingress and back ends, for `ngrokd demo` and for every test.

The lab answers as ngrok does, over real TLS, HTTP and sockets, or over streams in memory under a simulated clock.
It shares no code with what it proves: its header codec is its own, and of the relay it borrows only the TLS stream
and the transports, because half-close and raw aborts need them.
"""

from __future__ import annotations
