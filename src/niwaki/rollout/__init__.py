"""Staged roll-out of a compressed model behind a gateway, with the way back to the dense one decided by evidence.

    $ niwaki rollout run --stable http://127.0.0.1:8001 --canary http://127.0.0.1:8002 --limits report/compare.json

From below: `tally` and `signals` (what is counted), `sequential` (tests that may be looked at any time), `decision` (a
pure function), `drift`; `settings`, `limits`, `routing`, `answers`; `upstream`, `scoring`; `store`, `ledger`,
`controller` (state and its changes); `auditing`, `background`, `guard`, `passing`, `gateway`, `metrics`, `dashboard`,
`app`; `running` puts it together. `exporting` and `manifest` stand beside it.
"""
