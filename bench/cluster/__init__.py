"""Hosts with slow links on one machine, and the sparse collectives beside what a user would write, over real TCP."""
