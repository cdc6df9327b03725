"""What measures: the harness that this project's own benchmarks use, and the command `logitless bench` on top of it.

    problem, provider, providers/         what is computed, and every way to it once; providers/choice chooses
    machine, environment                  the device with its clock and its memory, and what a measurement depends on
    measure, memory, work, worker         a part: errors, memory and time in turns, in a process that may die
    targets, tables, report               results, as ratios and as tables; a file that is brought up to date

    request, defaults, command            what a user asks for, completed by device and model
    session, progress                     all parts of a request, and the time that is left
    curves, limits, model_step, text      along one size; the most that fits; a real model's step on text
    results, schema.json                  the file of a session
    fits, significance, compare           exponents; whether two runs differ
    sections, summary, plots, svg, page   Markdown, and the page

Nothing below imports it.
"""
