"""A server of checkpoint folders with OpenAI's API, from a bundle that holds the model's whole step: docs/example-server.md.

PYTHONPATH=examples python -m serve.app models/llama build/llama.rpac
"""
