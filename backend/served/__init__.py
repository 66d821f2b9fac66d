"""Models behind an OpenAI-compatible server (`trtllm-serve`, vLLM, ...): listed, asked and measured over HTTP.

`address` says what a base URL may be, `transport` reads one answer within its limits, `completion` makes pieces of text
of it, `client` is a served model as the chat takes it, `known` what the allowed servers offer, `measure` how fast
one is. Only addresses of the operator's setting `[served] urls` are ever contacted. Imports no torch.
"""
