"""Our attacks beside the public libraries', in one run: `python3 course.py bench`."""
