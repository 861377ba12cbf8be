"""What measurements share: timings, cards, workloads, the engines they compare."""
