"""What operators touch: the control socket, the health checks over HTTP, the service manager."""
