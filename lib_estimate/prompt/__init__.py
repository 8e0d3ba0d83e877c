r"""The prompt language of AUTOMATIC1111, for hosts that have none of their own.

Re-implemented from the behaviour of AUTOMATIC1111 1.10.1 (commit 82a973c0), first pass, with the setting
"use old scheduling" off. Inside a webui this folder is not used: there the webui's own parser speaks.

A prompt goes through these functions in this order, each of which can be used alone:

    schedule.extra_network_tags   "<lora:name:1> a cat"      tags out, text left
    schedule.split_and            "a cat :1.2 AND a dog"     several prompts, each with a weight
    schedule.prompt_schedule      "[cat:dog:0.5], [a|b]"     the text that holds up to each sampling step
    chunks.chunks                 "a (cat:1.3) BREAK x"      token ids and weights in pieces the text encoder can take
      attention.parse_attention                              (called by chunks) text with its weight
      chunks.EmbeddingNames                                  (given to chunks) finds the embeddings among the tokens
    attention.apply_emphasis                                 the weights, put onto what the text encoder made of a chunk

Nothing here touches a model, and nothing imports torch.
"""
