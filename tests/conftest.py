"""What holds for all tests: Hypothesis judges none by a time, which other work would take."""

from hypothesis import HealthCheck, settings

# What is in force so far; where CI is set, that is a profile of its own.
_before = settings()
settings.register_profile(
    "unhurried",
    _before,
    deadline=None,
    suppress_health_check=[*_before.suppress_health_check, HealthCheck.too_slow],
)
settings.load_profile("unhurried")
