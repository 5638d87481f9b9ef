"""Memory: training states, the moments of a step, the allocator, and the cache of serving."""
