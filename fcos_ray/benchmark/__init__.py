"""Benchmark: what a cluster will do with a job, stage by stage.

photographs.py  draws JPEGs that cost what photographs cost
stages.py       each stage alone, in seconds per image; detectors alone, in images per second
null.py          a detector without a model
fidelity.py     what --fast-decode costs in mAP
verdict.py      what limits a job, in words
whole.py        all of it, and the job
"""
