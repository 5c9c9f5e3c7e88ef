"""What holds for all tests: Hypothesis gives no example a time, which other work would take."""

from hypothesis import settings

# On top of what is in force, which is another profile where CI is set.
settings.register_profile("unhurried", settings.default, deadline=None)
settings.load_profile("unhurried")
