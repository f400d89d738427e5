"""One HTML page of one run, or of several beside each other.

    run directories ──> reading ──> groups ──> figures ──> page
                        Run         by config  plotly      one file, readable offline

Reads what a run leaves on disk and nothing else, while it goes on or afterwards: no engine, no Ray, no torch. What is
missing or damaged is named on the page, and the rest is shown.
"""
