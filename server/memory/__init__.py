"""Memory of GPUs: what there is, what each model needs, and its share. Knows neither vLLM nor how models are run.

server/placement.py puts the operator's settings and the models together into a plan.
"""
