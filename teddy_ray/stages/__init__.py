"""The stages, each on its part of Ray. `run(session)` of a stage publishes its artifact or raises."""
