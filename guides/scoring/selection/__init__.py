"""Selection rules: from a pool of scored candidates to the choice of one. Know nothing of engines and rewards."""
