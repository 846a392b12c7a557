//! Runs models: the graph, its KV cache, tokenizer, chat template, sampler, and perplexity.
