"""How much activations and outputs say: entropies, mutual and usable information, its decomposition, calibration."""
