"""How right an answer must be: attention in float32, the tolerances, and the calls that a bundle stores answers to."""
