"""``jupyter sandbox ...``: the administrator's and the user's command line.

Nothing of the core is imported before a command needs it: ``--help`` and ``ps`` answer at once, and a part that is
broken breaks only the commands that use it.
"""
