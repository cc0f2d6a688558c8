"""HTTP of both servers, `niwaki serve` and the gateway of `niwaki rollout`: limits, keys, errors. No routes."""
