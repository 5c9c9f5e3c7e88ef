"""What the doctor looks at. Each check takes the settings and yields findings; none changes
anything, and none needs the agent. `agent.doctor` has the list of all."""

from agent.views import Finding, Result


def ok(name: str, message: str) -> Finding:
    return Finding(name=name, result=Result.OK, message=message)


def warning(name: str, message: str, hint: str) -> Finding:
    return Finding(name=name, result=Result.WARNING, message=message, hint=hint)


def error(name: str, message: str, hint: str) -> Finding:
    return Finding(name=name, result=Result.ERROR, message=message, hint=hint)
