"""Limits, keys and errors that stand before both HTTP servers: `niwaki serve` and the gateway of `niwaki rollout`."""
