"""A request's way from its wire form to events: resolve, build, admit, run. Knows nothing of HTTP."""
