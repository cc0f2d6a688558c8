"""What stands before both servers of niwaki, `niwaki serve` and the gateway of `niwaki rollout`.

Who may ask (`niwaki.keys`), how large and how slow a request may be, and how it is told no.
"""
