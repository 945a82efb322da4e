"""Gradients of the loss: how they flow through the blocks, what of them is noise, which samples and tasks they come from."""
