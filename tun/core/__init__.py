"""The TCP/IP host, without a clock or a descriptor: packets, time and commands in; packets and deadlines out."""
