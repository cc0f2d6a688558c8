"""Mathematics that several methods share: masks, rounding, column sweeps, training of a block."""
