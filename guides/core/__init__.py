"""Parts that guides are made of: types, errors, interfaces of the server, and the Context. Knows no algorithm."""
