"""What each section and key is for, in words: the one place where that is written.

`python -m ngrokd.config.manual` makes the commented file, the page and the JSON Schema from it.
"""

from __future__ import annotations

from typing import Final

SECTIONS: Final = {
    "api": "ngrok's API: which endpoints exist.",
    "ingress": "ngrok's binding ingress: where the bytes go. It is always verified.",
    "state": "What is kept from one start to the next: identity, certificate, key, the addresses of all names.",
    "net": "The network interface on which apps' connections arrive.",
    "pool": (
        "Connections to the ingress that are ready before an app needs one: made and verified, for any "
        "endpoint. How many follows from what is used; without a request for five minutes there are none."
    ),
    "limits": "What apps on this machine, or strangers, may cost.",
    "hosts": "The hosts file, by which apps find the names.",
    "control": 'The socket that "ngrokd status" and the other commands ask.',
    "http": "Health checks over HTTP: /health, /ready and /status.",
    "log": "What is said on stderr.",
}

KEYS: Final = {
    "api.url": "Where it is. https only, because the API key is sent there.",
    "api.key": (
        'The API key. Better than here, where backups and colleagues see it: "sudo ngrokd set-api-key", which '
        "checks the key and stores it in the state directory. The first of these counts: "
        "$CREDENTIALS_DIRECTORY/api_key (systemd's LoadCredential=), the file that $NGROKD_API_KEY_FILE "
        "names, key_file, the stored key, key, $NGROK_API_KEY."
    ),
    "api.key_file": "A file that holds the API key and nothing else, say one that a secrets manager writes.",
    "api.ca_file": (
        "Certificate authorities to trust for the API instead of the system's: a PEM file, for a proxy that ends TLS."
    ),
    "api.poll_interval": 'How often ngrok is asked for the endpoints, from "1s" up.',
    "api.timeout": "How long one question to the API may take.",
    "api.selectors": (
        "Which endpoints are for this machine: expressions over endpoints, which ngrok is told when the daemon "
        'registers and when they change. "true" means all.'
    ),
    "ingress.address": 'HOST:PORT; "" means what the API returned, else kubernetes-binding-ingress.ngrok.io:443.',
    "ingress.ca_file": (
        "More certificate authorities to trust for it, besides the system's and the files in "
        "/etc/ssl/certs/ngrok/: a PEM file."
    ),
    "ingress.ca_fingerprints": (
        "SHA-256 fingerprints of authorities that the ingress may present itself and that are then trusted to "
        'have issued its certificate. The default is ngrok\'s own, "CN=Intermediate CA, OU=prod, O=ngrok Inc". '
        "[] trusts none in this way."
    ),
    "ingress.connect_timeout": (
        "How long connecting, the TLS handshake and the binding header may take together, and with them a "
        "connection that waits for its turn. After that the app's connection is refused."
    ),
    "state.directory": (
        "It is made with mode 0700 where it is missing. The Go ngrokd's own files are read and written as they are."
    ),
    "net.mode": '"tun" is a TUN device. "auto" takes the best way there is, which is "tun".',
    "net.interface": (
        "Its name. Daemons that run side by side each need a name, a subnet, a state directory, a socket and "
        "a port for health checks of their own."
    ),
    "net.subnet": "The IPv4 network that the names get their addresses from. The first address is ours.",
    "net.subnet6": (
        'The IPv6 network in which each name has a second address, a /112 or larger. "auto" is a unique local '
        '/64, made at random once and kept in the state directory; "off" is none. Names get these addresses '
        "only while they work."
    ),
    "net.mtu": "Largest packet, in bytes. 0: the best, which is 1500 with offload.",
    "net.offload": (
        "Let the kernel finish checksums and cut large segments. false is slower, and helps where a kernel "
        "has a bug there."
    ),
    "net.allow_sources": (
        'Other machines or containers whose packets are answered, as networks: ["172.17.0.0/16"]. Those of '
        "this machine always are."
    ),
    "net.workers": (
        "Processes that carry connections. 1: the daemon's own. More of them use more processors, each for "
        "its share of the connections, and have no rights on this machine; they share the limits below. "
        '"auto": one for two processors. (Linux)'
    ),
    "net.configure": "Configure the interface: address, route, MTU. false: somebody else does.",
    "net.drain": "How long open connections may go on after SIGTERM before they are reset.",
    "pool.max": "At most so many. 0: each app's connection is made when it is asked for.",
    "pool.max_age": "How long one may wait to be used. If the ingress hangs up earlier, that is learned.",
    "pool.idle": "So many while little is going on.",
    "pool.spin": (
        "How long to keep looking for the next packet before going to sleep, while packets follow each other so "
        "closely that this pays: a question and its answer are quicker by the time a core needs to wake up. "
        '"0s": never.'
    ),
    "limits.flows": "Connections at the same time.",
    "limits.half_open": "Connections whose handshake with the app is not finished.",
    "limits.undecided": "Connections that wait for ngrok's answer.",
    "limits.dials": (
        "Connections being made to the ingress at the same time for apps that wait for them; more wait in the "
        "order of their arrival. (The pool's have a bound of their own, pool.max.)"
    ),
    "limits.buffer": "Data held for one connection in each direction; half of it above 64 active connections.",
    "limits.buffers": "Data held for all connections together.",
    "limits.endpoints": "Endpoints that are served; a subnet that is smaller holds fewer.",
    "hosts.enabled": "false: the addresses are there, and naming them is your business.",
    "hosts.path": "Where it is. Only lines between our own markers are touched. $NGROKD_HOSTS_PATH goes before it.",
    "control.socket": "$NGROKD_SOCKET goes before it.",
    "control.group": (
        "A group whose members may look besides root. Changing things is for root and the daemon's own user. "
        '"": the group of the daemon\'s process.'
    ),
    "http.listen": (
        'ADDRESS:PORT, or "" for none. It answers anybody who can reach it, so keep it on the loopback '
        "interface; port 0 is any free one."
    ),
    "log.level": "debug, info, warning or error; $NGROKD_LOG_LEVEL and the option --log-level go before it.",
    "log.format": (
        '"text" is for people, "json" one JSON object per line; "auto" is text on a terminal and in systemd\'s '
        "journal (which notes time and priority itself), and JSON elsewhere. $NGROKD_LOG_FORMAT and "
        "--log-format go before it."
    ),
}
