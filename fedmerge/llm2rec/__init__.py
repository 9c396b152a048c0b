"""LLM2Rec for decoders, in isolated form: losses of tokens and of titles, for clients and for the server.

    head     the language-model head of a decoder, and the loss of single tokens
    titles   items as titles, and the sequences of CSFT
    masking  masked tokens of titles
    stages   the server's training of a merge: MNTP, then SimCSE

Source: LLM2Rec, KDD 2025, arXiv:2506.21579; its second half is LLM2Vec's, arXiv:2404.05961.
Differs: LoRA in place of full fine-tuning; clients train apart, each on its own users.
"""
