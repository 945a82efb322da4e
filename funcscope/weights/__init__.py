"""The weights themselves: their spectra and codes, what can be pruned, how models are merged, how modular they are."""
