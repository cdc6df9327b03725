"""`logitless plan`: memory and time of a head and its loss, predicted from formulas before anything is computed.

shape    a model's sizes, from its config.json          sizes    bytes as people write them
step     what is planned, its strategies and chunks     terms    memory, term by term
rates    how fast a machine is                          cost     products and passes, in seconds
rest     rough terms outside the head                   choose   what fits, and what to choose
report   a plan as text and as JSON
"""

from .choose import StepPlan, Strategy, plan, read_dtype
from .rates import Rates, calibrate, given_rates
from .report import report_json, report_lines
from .shape import Shape, read_shape
from .sizes import read_bytes, show_bytes

__all__ = [
    "Rates",
    "Shape",
    "StepPlan",
    "Strategy",
    "calibrate",
    "given_rates",
    "plan",
    "read_bytes",
    "read_dtype",
    "read_shape",
    "report_json",
    "report_lines",
    "show_bytes",
]
