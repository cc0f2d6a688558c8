"""Staged roll-out of a compressed model behind a gateway. Evidence decides on more traffic or on a return to dense.

    $ niwaki rollout run --stable http://127.0.0.1:8001 --canary http://127.0.0.1:8002 --limits report/compare.json

The modules, from the bottom to the top:

- `histogram`, `signals`: counts; `sequential`: tests valid at any time; `decision`: a pure function; `drift`: alarms
- `settings`, `limits`, `routing`, `answers`, `chat_template`: what is configured, and what is read of a request
- `http_client`, `upstream`, `scoring`: both servers
- `store`, `journal`, `dense_mark`, `counters`, `controller`, `start`: the state
- `auditing`, `streaming`, `gateway`, `dashboard`, `app`: the gateway; `running` assembles it

Limits and keys of requests are in `niwaki.serve.http`.
"""
