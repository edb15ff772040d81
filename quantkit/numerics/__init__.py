"""Pure tensor functions: affine codes, packing, factorizations, scale search, divergences."""
