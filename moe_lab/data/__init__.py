"""What the model reads: sources, splits, tokenizer, packed and resumable batches, and the bigram they are held against.

`moe_lab.data.loader.open_data` is the way in.
"""
