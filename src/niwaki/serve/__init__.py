"""An OpenAI-compatible server for results that other engines cannot run: packed, of uneven shape, contextual.

    request ─► limits ─► app ─► shapes ─► prompts ─► queue ─► engine ─► batch ─► model
    answer  ◄─ exchange ◄─ answers, replies ◄─ inbox ◄─ events ◄─ text, sampling

One thread computes (`engine`), one loop talks to clients (`app`), one process renders chat templates (`rendering`).
Where llama.cpp or vLLM can run a result, they are faster: see docs/serving.md.

    niwaki serve OUT --port 8000
"""
