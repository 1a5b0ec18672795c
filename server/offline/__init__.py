"""Commands without HTTP: evaluate, train, calibrate, list. They use the server's parts; no part uses them."""
