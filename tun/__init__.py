"""A TCP/IP host in a box: give it a device, it gives you connection requests and streams."""
