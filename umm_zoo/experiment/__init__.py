"""The experiment file: reading it, checking it whole against the classes it names, and building what it says."""
