"""OpenAI-compatible server for results that other engines cannot run: packed, of uneven shape, contextual.

    request ─► http/limits ─► app ─► request_models ─► prompts ─► engine ─► batch ─► model
    answer  ◄─ request_handler ◄─ answers, response_models ◄─ event_queue ◄─ decoding ◄─ text, sampling

One thread computes (`engine`), one loop talks to clients (`app`). One process renders chat templates
(`data.rendering`).
Where llama.cpp or vLLM can run a result, they are faster: see docs/serving.md. The gateway of a roll-out is `rollout`.

    niwaki serve OUT --port 8000
"""
