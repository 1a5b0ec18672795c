"""HTTP: routes, responses, transport. Knows nothing of vLLM; work goes through server/requests."""
