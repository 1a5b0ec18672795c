"""GPU memory: what there is, what each model needs, and who gets what. Knows neither vLLM nor how models are run."""
