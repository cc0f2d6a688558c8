"""Results in the formats of other engines. Nothing here runs them."""
