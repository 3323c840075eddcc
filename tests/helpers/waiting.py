"""How long tests wait for processes."""

# Seconds after which a process that a test started counts as hung. It is no measure of speed: an idle machine needs
# a hundredth of it, one that is busy with other things may take many times as long.
DEADLINE = 900
