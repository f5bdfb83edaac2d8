"""Grading: strangers' notebooks in, a gradebook, tables and feedback pages out.

    submissions   finds and reads what was handed in, and mends its cells
    sandbox       starts the process that runs a stranger's code, and reads what it says
    warden        ends that process, with all that it started, when it breaks a limit
    jury          that process: runs the cells, calls the checks
    gradebook     nbgrader: the teacher's cells put back, points, feedback, exports
    run           all of it, a line for each submission

Nothing here imports torch, but the jury.
"""
