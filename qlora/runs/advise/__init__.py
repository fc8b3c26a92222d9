"""`qlora advise`: before a run whether training is the right tool, after it what the run learned."""
