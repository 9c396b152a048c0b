"""RMM-style merging: a search for the candidate that every layer group takes its update from.

To be read in this order:

    candidates  what a group can take, and the adapter of a map
    searchers   coordinate ascent and evolution, and the table of all searchers
    ppo         the searcher of the paper
    episodes    the search: running means over shards of users, the second reading, what is on disk
    rewards     the reward on pseudo-users, for a process that has the catalogs
"""
