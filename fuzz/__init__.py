"""Fuzz targets: hostile bytes against everything that reads bytes from outside. See README.md."""
