"""What things are called here: addresses, the hosts file, and what to change when the API changes its mind. Pure."""
