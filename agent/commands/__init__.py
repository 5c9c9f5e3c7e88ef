"""The commands of `bootwright`, a module for each group; `agent.cli` loads the one in use."""
