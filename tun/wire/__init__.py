"""What the bytes mean: headers, options, checksums. Pure; fed by the network, so nothing here raises unasked."""
