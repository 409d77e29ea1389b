"""Carrying bytes: from an app's flow to ngrok's binding ingress over verified mTLS, and back, exactly.

`handler` decides each request, `ingress` gives it a TLS stream on which the binding header has been exchanged, `splice`
moves the bytes until both directions have ended. `tls` and `transport` are the path under them, `binding` the header.
"""

from __future__ import annotations
