"""The sizes at which the approximate backward on a GPU cuts its list of (token, block) pairs."""

#: Vocabulary entries of a block.
PAIR_BLOCK = 128
#: Tokens of a span: the list notes where each block's tokens of each span begin.
PAIR_SPAN = 128
