"""What all stages agree on: the attention of a model, the features it may have, arrays, meshes and programs. No JAX here."""
