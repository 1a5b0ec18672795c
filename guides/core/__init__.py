"""What a guide is made of: types, errors, the interfaces of the server, and the Context. Knows no algorithm."""
