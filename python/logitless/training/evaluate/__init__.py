"""`logitless evaluate`: how good a model's samples, answers and preferences are, with confidence intervals.

command     options  ->  rows  ->  measures  ->  table, JSON, samples
sampled     measures of completions that the model samples, and their rows
answers     measures of answers and pairs that the rows hold
measures    from numbers of single items to a mean and its interval
"""
