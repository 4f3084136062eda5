"""Memory, time, traffic and cost of a run before it is started; nothing here allocates what it plans."""
