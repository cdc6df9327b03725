"""The implicit reward of a model's answers, behind `logitless reward`.

command     the command: models, batches, files
rows        the answers to score, their prompts and labels
scores      an answer's tokens and their numbers, from the statistics of a model and of its reference
pieces      the text that each token adds
ranking     how well the numbers tell right answers from wrong ones
summary     all rows together, for a program and for a reader
scale       from numbers to colours
page        the HTML page
picture     the plot
"""
