"""From a prompt to its answer.

    llm.py          LLM: prompts in, completions or a stream out; how many run at once
    runner.py       the running batch: prefill, then `step` until every sequence is finished
    sequence.py     one prompt and its growing answer: when it ends, which of its text may be shown
    sampler.py      SamplingParams; logits -> probabilities -> a token (pure functions)
    speculative.py  multi-token prediction drafts the next tokens, the model checks them; lossless

Import from these files; this package itself loads nothing.
"""
