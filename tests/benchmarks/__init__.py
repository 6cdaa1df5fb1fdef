"""How fast the engine is, beside torch.autograd and the article's own code: ``python -m tests.benchmarks``."""
