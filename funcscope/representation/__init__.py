"""How activations are laid out: units, superposition, similarity, dimension, what moves through the layers."""
