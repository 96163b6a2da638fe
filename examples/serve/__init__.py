"""A server of a small Llama on rpac's attention: continuous batching, shared prefixes, tokens streamed over HTTP.

PYTHONPATH=examples python -m serve.app build/serve-demo.rpac
"""
