"""vLLM behind our API: it computes, the contract and the words stay ours."""
