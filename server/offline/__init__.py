"""Commands that need no HTTP: evaluate, train, calibrate. Use the server's parts, and are used by none of them."""
