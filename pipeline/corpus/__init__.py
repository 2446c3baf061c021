"""Look at the first samples of a corpus: what its fields hold, and whether a configuration fits them."""
