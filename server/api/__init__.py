"""HTTP: routes, wire schemas, responses, errors. Knows nothing of vLLM; work goes through server/requests."""
