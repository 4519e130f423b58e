"""The HTTP side: `steering` from a body to admission, refusals, reports, and routes that say what is served.

Knows ASGI and the shapes of the OpenAI and Anthropic APIs, never vLLM.
"""
