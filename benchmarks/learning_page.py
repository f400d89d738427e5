def write(runs, page):
    pass
