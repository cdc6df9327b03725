"""What a file comes to, in sentences that are computed from it."""

from __future__ import annotations

from collections.abc import Iterator

from . import fits
from .targets import MIB, Json, allocated, ratio

#: Gradients no further than this from those in float64 are exact: float32 rounds so.
EXACT = 1e-5
#: Nor is more asked of them than that they are within so many times the materialised loss's own rounding.
ROUNDING = 2.0


def headlines(results: Json) -> list[str]:
    """A sentence or two of every part that has something to say."""
    return [line for name, part in results["parts"].items() for line in SENTENCES[part["kind"]](name, part)]


def _step(name: str, part: Json) -> Iterator[str]:
    base, best = _materialised(part), fastest(part, "logitless", "peer")
    if base is None or best is None:
        return
    yield f"{name}: the fastest exact method {_against(best, base)}."
    ours = fastest(part, "logitless")
    if ours is not None and ours is not best:
        yield f"{name}: the fastest of logitless {_against(ours, base)}."


def _model(name: str, part: Json) -> Iterator[str]:
    base, best = _materialised(part), fastest(part, "logitless")
    if base is not None and best is not None:
        yield f"{name}: in a whole step of {part['model']} the fastest of logitless {_against(best, base)}."


def _limit(name: str, part: Json) -> Iterator[str]:
    base = next((row for row in part["rows"] if row["role"] == "materialised"), None)
    rows = [row for row in part["rows"] if row["role"] == "logitless" and row["largest"]]
    if base is None or not base["largest"] or not rows:
        return
    best = max(rows, key=lambda row: row["largest"])
    budget = f"{part['memory_bytes'] / MIB:.0f} MiB"
    bound = "" if best["ended_by"] == "memory" else "at least "
    ours = f"{best['provider']} fits {bound}{best['largest']} {part['unit']}"
    yield f"{name}: within {budget}, {ours}, and the materialised loss {base['largest']}."


def _curve(name: str, part: Json) -> Iterator[str]:
    roles = fits.providers(part)
    found = {provider: fits.fit(fits.memories(part, provider)) for provider in roles}
    grown = [
        (provider, fit) for provider, fit in found.items() if fit and roles[provider] in ("materialised", "logitless")
    ]
    if len(grown) > 1:
        texts = (f"{part['axis']}^{fit.exponent:.2f} with {provider}" for provider, fit in grown)
        yield f"{name}: extra memory grows as {'; '.join(texts)}."


SENTENCES = {"step": _step, "curve": _curve, "limit": _limit, "model": _model}


def fastest(part: Json, *roles: str) -> Json | None:
    """The exact provider of these roles with the least time, relative to the materialised loss within rounds."""
    base = _materialised(part)
    rows = [row for row in part["rows"] if row["role"] in roles and not row["failure"] and exact(row, base)]
    ratios = [(value, row) for row in rows if (value := ratio(row, base)) is not None]
    return min(ratios, key=lambda pair: pair[0], default=(None, None))[1]


def exact(row: Json, base: Json | None) -> bool:
    """Whether its gradients are as far from those in float64 as rounding explains; False where that is not known."""
    error = _gradient_error(row)
    allowed = max(EXACT, ROUNDING * (_gradient_error(base) or 0.0))
    return error is not None and error <= allowed


def _gradient_error(row: Json | None) -> float | None:
    errors = (row or {}).get("error") or {}
    return max((errors[name] for name in ("d_hidden", "d_weight") if name in errors), default=None)


def _materialised(part: Json) -> Json | None:
    rows = (row for row in part["rows"] if row["role"] == "materialised")
    return next((row for row in rows if not row["failure"] and row["seconds"]), None)


def _against(row: Json, base: Json) -> str:
    """The provider, its time and its memory beside the materialised loss's."""
    time = ratio(row, base)
    own, others = allocated(row), allocated(base)
    memory = ""
    if own is not None and others is not None:
        more = "less" if own <= others else "more"
        change = f"{abs(others - own) / MIB:.0f} MiB {more} memory"
        memory = f" and {change} ({own / MIB:.1f} instead of {others / MIB:.1f} MiB)"
    return f"is {row['provider']}, with {time:.2f} of the materialised loss's time{memory}"
