"""What keeps an output in order between jobs. Never runs the model, needs no Ray.

status.py   which runs there are, and how far one is
marks.py    retract, restore, abandon: which runs count
purge.py    what nothing needs any more
forget.py   images taken out of everything that was written: the only room that rewrites committed files
"""
